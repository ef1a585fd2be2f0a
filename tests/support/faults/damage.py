"""Damage to video files, by a seed: what disks, networks and interrupted copies do."""

from __future__ import annotations

import random
from pathlib import Path

KINDS = ("flip bits", "zero a block", "noise", "cut off", "cut out", "swap blocks", "repeat a block")


def damage(path: Path, seed: int) -> str:
    """Damage a file in place, and return how. The beginning and the end are hit as well as the middle."""
    choose = random.Random(seed)
    data = bytearray(path.read_bytes())
    kind = KINDS[seed % len(KINDS)]
    length = min(choose.choice([16, 200, 2000, 20_000]), len(data) // 3)
    start = choose.randrange(len(data) - length)
    match kind:
        case "flip bits":
            for _ in range(choose.choice([1, 8, 64])):
                data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        case "zero a block":
            data[start : start + length] = bytes(length)
        case "noise":
            data[start : start + length] = choose.randbytes(length)
        case "cut off":
            del data[choose.randrange(1, len(data)) :]
        case "cut out":
            del data[start : start + length]
        case "swap blocks":
            other = choose.randrange(len(data) - length)
            first, second = data[start : start + length], data[other : other + length]
            data[start : start + length], data[other : other + length] = second, first
        case "repeat a block":
            data[start:start] = data[start : start + length]
    path.write_bytes(data)
    return kind
