"""Text-guided masks: captions, scorers, score maps kept on disk, students, and how they compare."""
