"""Data loading and training for text-guided video masked autoencoders (Fan et al., ECCV 2024)."""

__version__ = "0.1.0"
