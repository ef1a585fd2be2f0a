"""Read weights that torch.save wrote, prove that weights are undamaged, and check that they fit a model."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class DamagedFile(ValueError):
    """A file that is cut off, changed, or something else than its name says. The message names it and says why."""


def read_torch_file(path: Path, problem: str) -> Any:
    """Read a file of torch.save onto the CPU, without running code from it.

    problem   how the message begins: "x.pt is not a readable checkpoint"

    Raises DamagedFile. Any changed bit is noticed: torch writes checksums, which it does not compare itself. Only files
    of torch before 1.6 have none.
    """
    try:
        if zipfile.is_zipfile(path):
            _verify_records(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many kinds for a damaged file
        reason = str(error).partition("\n")[0].partition(". ")[0]  # without torch's advice, which does not apply here
        raise DamagedFile(f"{problem}: {reason or type(error).__name__}") from error


def _verify_records(path: Path) -> None:
    """Compare the checksum of every record. Raises ValueError, or what zipfile raises, where one does not fit."""
    with zipfile.ZipFile(path) as file:
        for record in file.infolist():
            # The checksums do not cover the table of records. torch stores records plain, and would read one that says
            # otherwise in part or not at all.
            if record.file_size != record.compress_size or record.compress_type or record.external_attr:
                raise ValueError(f"its entry {record.filename} is damaged")
        if (name := file.testzip()) is not None:
            raise ValueError(f"its entry {name} is damaged (wrong checksum)")


def digest_weights(weights: dict[str, Tensor]) -> str:
    """Return a digest of names, types, shapes and values of weights on the CPU."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_shapes(expected: dict[str, Tensor], got: dict[str, Tensor], source: str) -> None:
    """Compare the names and shapes of two state dicts.

    Raises ValueError, which names `source` and both shapes, if `got` does not fit `expected`.
    """
    missing, extra = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{source} holds the weights of a different model: missing {missing[:3]}, not expected {extra[:3]}"
        )
    for name, tensor in expected.items():
        if tensor.shape != got[name].shape:
            raise ValueError(
                f"{source} holds the weights of a different model: {name} is {list(got[name].shape)} there, "
                f"{list(tensor.shape)} in this configuration"
            )
