"""The oracle: a class label as a caption (Fan et al. 2024, table 6b)."""

from __future__ import annotations

import re

from dali_pipelines.types import Caption
from tgmae.data.manifest import Manifest, count_videos

SOURCE = "oracle"


def read_label(label: str) -> str:
    """Return a label as words: brush_hair and ApplyEyeMakeup become "brush hair" and "Apply Eye Makeup"."""
    words = " ".join(str(label).replace("_", " ").split())
    return words if " " in words else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words)


def read_labels(manifest: Manifest) -> list[str]:
    """Return the label of every row, as words. Raises ValueError where no video has one."""
    labels = [read_label(label) for label in manifest.table.column("label").to_pylist()]
    if not any(labels):
        raise ValueError(
            f"none of {count_videos(len(labels))} has a label; labels come from folders named after classes, or from "
            "the column label of tgmae-data index FOLDER --csv FILE"
        )
    return labels


def caption_by_label(manifest: Manifest) -> list[list[Caption]]:
    """Return the label of every row as its caption; none for a row without one. Raises ValueError for no labels."""
    return [[Caption(label, SOURCE)] if label else [] for label in read_labels(manifest)]
