"""Data sets: from a folder of videos to the requests of a batch."""
