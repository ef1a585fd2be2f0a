"""Single flipped bits in files, to see that none passes in silence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path


def flip_bits(path: Path, count: int, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Yield byte and bit of `count` flips of a file, one at a time; the file is whole again afterwards."""
    whole = path.read_bytes()
    draw = random.Random(seed)
    try:
        for _ in range(count):
            byte, bit = draw.randrange(len(whole)), draw.randrange(8)
            flipped = bytearray(whole)
            flipped[byte] ^= 1 << bit
            path.unlink()  # a file that is mapped into memory must not change under its reader
            path.write_bytes(flipped)
            yield byte, bit
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(whole)


def count_silent(path: Path, count: int, read: Callable[[], object], seed: int = 0) -> tuple[int, int]:
    """Return how many of `count` flips were refused with a message of one line, and how many changed what is read.

    read   returns what is compared by ==, or raises ValueError or OSError
    """
    expected = read()
    messages: list[str] = []
    silent = 0
    for _ in flip_bits(path, count, seed):
        try:
            found = read()
        except (ValueError, OSError) as error:
            messages.append(str(error))
        else:
            silent += found != expected
    assert not [message for message in messages if "\n" in message]
    return len(messages), silent
