"""One video file: its frames by number, an excerpt, its motion vectors, its colours and orientation."""
