"""Damage as disks and memory do it: one bit of a file is another, and none may pass in silence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


def flip_bits(path: Path, count: int = 300, seed: int = 0, first_byte: int = 0) -> Iterator[int]:
    """Flip one random bit of a file at a time and yield its number; the file is whole again in the end.

    As many flips as there are bits, or more, are every bit once.

    Use it with `for bit in flip_bits(path):` around what must either refuse the file or read what was written.
    """
    whole = path.read_bytes()
    bits, generator = range(8 * first_byte, 8 * len(whole)), random.Random(seed)
    try:
        for bit in bits if count >= len(bits) else (generator.choice(bits) for _ in range(count)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.unlink()  # a file that is mapped into memory must not change under its reader
            path.write_bytes(damaged)
            yield bit
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(whole)


@dataclass
class Flips:
    """What came of flipping single bits of a file."""

    tried: int = 0
    refused: int = 0
    silent: int = 0  # something else was read
    messages: set[str] = field(default_factory=set)


def count_flips(path: Path, count: int, read: Callable[[], object], seed: int = 0, first_byte: int = 0) -> Flips:
    """Count what comes of `count` flips.

    read   returns what is compared by ==, or raises ValueError or OSError with a message of one line
    """
    expected, flips = read(), Flips()
    for _ in flip_bits(path, count, seed, first_byte):
        flips.tried += 1
        try:
            found = read()
        except (ValueError, OSError) as error:
            flips.refused += 1
            flips.messages.add(str(error))
        else:
            flips.silent += found != expected
    assert not [message for message in flips.messages if "\n" in message]
    return flips


class TryFlips(Protocol):
    """The fixture `try_flips`."""

    def __call__(
        self,
        path: Path,
        read: Callable[[], object],
        *,
        few: int = 300,
        all: int = 3000,
        seed: int = 0,
        first_byte: int = 0,
    ) -> Flips:
        """Flip bits as `count_flips` does, `few` of them in a test run; keep the counts; fail where one is silent."""
        ...  # fmt: skip
