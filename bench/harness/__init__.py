"""Shared by all benchmarks: command line, measuring in rounds, tables, reports."""
