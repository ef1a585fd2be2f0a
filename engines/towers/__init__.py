"""The networks that an engine runs."""
