"""Masks: scores for patches, and the top-k of them in every slot."""
