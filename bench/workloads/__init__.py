"""Work that is measured: videos and scorers, training steps, kernels, attention."""
