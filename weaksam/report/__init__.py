"""A run folder as one HTML file that needs nothing else: `write_report` of `weaksam.report.page`."""
