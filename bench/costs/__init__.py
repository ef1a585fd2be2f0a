"""Costs of a clip, counted from shapes. Nothing is timed."""
