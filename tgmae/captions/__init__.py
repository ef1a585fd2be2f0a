"""Captions: what to do where there are none, and the text embeddings of a batch."""
