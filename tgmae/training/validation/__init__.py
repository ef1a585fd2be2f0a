"""Validation: held-out clips, and the loss on them."""
