"""Pictures of what was measured and counted. `python -m bench.pictures` draws the reports."""
