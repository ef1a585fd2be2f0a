"""What an encoder has learned: frozen features of videos."""
