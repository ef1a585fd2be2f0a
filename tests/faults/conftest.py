"""How often each fault is tried: a few times in a test run, as often as docs/results.md says with TGMAE_FAULTS=all."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


@pytest.fixture
def repetitions() -> Callable[[int, int], int]:
    """Choose between few repetitions and all of them."""
    return lambda few, everything: everything if os.environ.get("TGMAE_FAULTS") == "all" else few
