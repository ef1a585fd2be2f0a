"""The networks that engines run."""
