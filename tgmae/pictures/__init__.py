"""Pictures of runs, masks and data sets, drawn with matplotlib."""
