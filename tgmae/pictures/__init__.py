"""Pictures of runs, masks and data sets."""
