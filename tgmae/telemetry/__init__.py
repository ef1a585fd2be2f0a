"""Time and throughput: stages, metrics, profiles."""
