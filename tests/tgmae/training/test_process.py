"""Garbage waits for the loop to ask."""

from __future__ import annotations

import gc
import weakref

import pytest

from tgmae.training.process import manual_garbage_collection


class _Node:
    """Refers to itself, so that counting references does not free it."""

    def __init__(self) -> None:
        self.me = self


def test_cycles_stay_until_collected() -> None:
    with manual_garbage_collection():
        assert not gc.isenabled()
        node = _Node()
        gone = weakref.ref(node)
        del node
        for _ in range(5000):  # more than the collector's threshold
            _Node()
        assert gone() is not None
        gc.collect(1)
        assert gone() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_comes_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), manual_garbage_collection():
        raise RuntimeError("stop")
    assert gc.isenabled()


def test_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with manual_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
