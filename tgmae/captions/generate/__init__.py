"""Captions by models: frames or class names in, texts out, kept in a file beside the manifest."""
