"""Files that torch.save wrote, read without running code from them and without passing damage on."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch


class DamagedFile(ValueError):
    """A file that is cut off, changed, or something else than its name says. The message names it and says why."""


def read_torch_file(path: Path, problem: str = "", allowed: tuple[type, ...] = ()) -> Any:
    """Read tensors and plain types onto the CPU, without running code from the file.

    problem   how the message begins: "x.pt is not a readable checkpoint"; by default "x.pt cannot be read"
    allowed   classes that may be in the file besides: they must do nothing but hold values

    Raises DamagedFile, in one line. Any changed bit is noticed: torch writes checksums, which it does not compare
    itself. Only files of torch before 1.6 have none.
    """
    try:
        start = read_start(path)
        if zipfile.is_zipfile(path):
            verify_records(path)
        elif start.startswith(b"PK"):
            raise ValueError("it is cut off")
        with torch.serialization.safe_globals([*allowed]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many kinds for a damaged file
        raise DamagedFile(f"{problem or f'{path} cannot be read'}: {first_line(error)}") from error


def read_start(path: Path) -> bytes:
    """Return the first bytes of a file. Raises ValueError where they show that the file is not there yet."""
    with path.open("rb") as file:
        start = file.read(100)
    if not start:
        raise ValueError("it is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS in place of the file; fetch that with git lfs pull")
    return start


def verify_records(saved: Path | IO[bytes]) -> None:
    """Compare the checksum of every record of what torch.save wrote.

    Raises ValueError, or what zipfile raises, where one does not fit.
    """
    with zipfile.ZipFile(saved) as file:
        for record in file.infolist():
            # The checksums do not cover the table of records. torch stores records plain, and would read one that says
            # otherwise in part or not at all.
            if record.file_size != record.compress_size or record.compress_type or record.external_attr:
                raise ValueError(f"its entry {record.filename} is damaged")
        if (name := file.testzip()) is not None:
            raise ValueError(f"its entry {name} is damaged (wrong checksum)")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without torch's advice to turn its safety check off."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if "weights only" in text.lower() or "weights_only" in text:
        pickled = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        return "it is not a file of weights alone" + (f": it holds a pickled {pickled[1]}" if pickled else "")
    return text if len(text) <= 300 else f"{text[:300]} …"
