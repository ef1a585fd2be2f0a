"""Worker processes: a pool that survives kills, and what decode workers do in it."""
