"""Faults: tried by tests, counted in one report."""
