"""Benchmarks: one module a question, each run as `python -m bench.NAME`.

Below them lie harness (measuring, tables, reports), workloads (what is measured), costs (what is counted), rivals (what
others do), gpu_report (the parts of `make gpu`) and pictures. A question imports from these rooms, never from another
question, and nothing outside bench imports from here.
"""
