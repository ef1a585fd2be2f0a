"""Damage as disks and memory do it: one bit of a file is another."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path


def flip_bits(path: Path, seed: int, count: int = 300) -> Iterator[int]:
    """Flip one random bit of a file at a time and yield its number; the file is whole again in the end.

    Use it with `for bit in flip_bits(path, 0):` around what must either refuse the file or read what was written.
    """
    whole = path.read_bytes()
    generator = random.Random(seed)
    try:
        for _ in range(count):
            bit = generator.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            yield bit
    finally:
        path.write_bytes(whole)
