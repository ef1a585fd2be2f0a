"""Where the time goes: named ranges, stage times, metrics and profiles."""
