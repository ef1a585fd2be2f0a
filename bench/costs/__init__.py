"""What a clip costs, counted from shapes; nothing is timed."""
