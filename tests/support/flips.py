"""Damage as disks and memory do it: one bit of a file is another, and none may pass in silence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path


def flip_bits(path: Path, count: int = 300, seed: int = 0) -> Iterator[int]:
    """Flip one random bit of a file at a time and yield its number; the file is whole again in the end.

    Use it with `for bit in flip_bits(path):` around what must either refuse the file or read what was written.
    """
    whole = path.read_bytes()
    generator = random.Random(seed)
    try:
        for _ in range(count):
            bit = generator.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.unlink()  # a file that is mapped into memory must not change under its reader
            path.write_bytes(damaged)
            yield bit
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
