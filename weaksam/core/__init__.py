"""Parts of a run: settings, storage, Arrow schemas and tables, Stage and Step. Imports neither Ray nor torch."""
