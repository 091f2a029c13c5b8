"""What a run is made of: settings, storage, Arrow schemas and tables, Stage and Step. Knows neither Ray nor torch."""
