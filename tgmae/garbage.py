"""Python's cyclic garbage collector, run when the loop says so instead of in the middle of launching kernels."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Inside, garbage that refers to itself is collected by `gc.collect` only, and what exists already is left out.

    The collector otherwise starts whenever enough objects were made, and looks at all of torch's and the manifest's: a
    pause in one process that every other process then waits for. Memory without cycles is freed at once as always.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
