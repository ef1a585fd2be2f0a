"""Captions: where they come from, what to do where there are none, and the text embeddings of a batch."""
