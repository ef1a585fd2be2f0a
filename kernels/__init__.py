"""Token operations of the training step, one file each. Imports nothing of tgmae."""
