"""Names for what a profiler sees. Imports nothing of tgmae, and torch only where it is loaded already."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import nvtx

_DOMAIN = "tgmae"


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """A stage on the timelines of `nsys` (an NVTX range) and of torch's profiler. Costs microseconds when nobody looks.

    Decode workers do without torch: there it is the NVTX range alone.
    """
    torch = sys.modules.get("torch")
    with nvtx.annotate(name, domain=_DOMAIN):
        if torch is None:
            yield
        else:
            with torch.profiler.record_function(name):
                yield
