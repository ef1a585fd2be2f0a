"""Training: set-up, loader, step, checkpoints."""
