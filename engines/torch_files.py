"""Files that torch.save wrote, read without running code from them and without passing damage on."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch


def load_plain(path: Path) -> Any:
    """Read tensors and plain types onto the CPU. Raises ValueError, in one line, for any other file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut off or is something else
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error


def load_own(path: Path) -> Any:
    """Read a file that this project wrote, as `load_plain` does. Raises ValueError for a single flipped bit as well.

    torch.save stores a checksum of every tensor, which torch.load ignores.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many kinds for damaged entries, such as NotImplementedError
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} is another one")
    return load_plain(path)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without torch's advice to turn its safety check off."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if "weights only" in text.lower() or "weights_only" in text:
        return "it is not a file of weights alone"
    return text if len(text) <= 300 else f"{text[:300]} …"
