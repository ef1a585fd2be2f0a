"""What every benchmark shares: its command line, measuring in rounds, tables, reports."""
