"""Named ranges on the timelines of profilers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import nvtx

_DOMAIN = "tgmae"


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Mark a stage for `nsys` (as an NVTX range) and for torch's profiler. Costs microseconds when no profiler runs.

    Decode workers run without torch: there it is the NVTX range alone.
    """
    torch = sys.modules.get("torch")
    with nvtx.annotate(name, domain=_DOMAIN):
        if torch is None:
            yield
        else:
            with torch.profiler.record_function(name):
                yield
