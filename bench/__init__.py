"""Benchmarks: one module a question, each run as `python -m bench.NAME`.

They share the folders harness (measuring, tables, reports), workloads (work that is measured), costs (work that is
counted), rivals (other projects' loaders and decoders), gpu_report (for `make gpu`) and pictures. A benchmark imports
from these folders, never from another benchmark, and nothing outside bench imports from here.
"""
