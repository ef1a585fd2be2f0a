"""What to do with videos that have no caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

from tgmae.data.manifest import Manifest


def require_captions(manifest: Manifest, no_caption: Literal["error", "exclude", "label"]) -> tuple[Manifest, str]:
    """Drop empty captions, then treat the videos left without any as `no_caption` says.

    Returns the manifest, in which every video has a caption, and what was done for that ("" for nothing).
    Raises ValueError, naming them, where they are an error, have no label to take, or are all there is.
    """
    texts = [[text.strip() for text in row if text.strip()] for row in manifest.table.column("captions").to_pylist()]
    missing = [row for row, captions in enumerate(texts) if not captions]
    paths = manifest.table.column("path")
    labels = [str(label).replace("_", " ").strip() for label in manifest.table.column("label").to_pylist()]
    bare = [row for row in missing if not labels[row]]
    if missing and no_caption == "error":
        advice = ["leave them out: --mask.no-caption exclude"] * (len(missing) < len(manifest))
        advice += ["take their labels for captions: --mask.no-caption label"] * (not bare)
        advice += ["train without text: --mask.kind tube"]
        raise ValueError(
            f"{len(missing)} of {len(manifest)} videos have no caption, such as {_some(paths, missing)}. Captions come "
            f"with tgmae-data index FOLDER --csv FILE; or {'; or '.join(advice)}"
        )
    note = ""
    if missing and no_caption == "label":
        if bare:
            raise ValueError(
                f"{len(bare)} videos have neither caption nor label, such as {_some(paths, bare)}; "
                "leave them out with --mask.no-caption exclude"
            )
        for row in missing:
            texts[row] = [labels[row]]
        note = f"{len(missing)} videos without a caption take their label for one"
    column = manifest.table.schema.get_field_index("captions")
    table = manifest.table.set_column(column, "captions", pa.array(texts, pa.list_(pa.string())))
    if missing and no_caption == "exclude":
        if len(missing) == len(manifest):
            raise ValueError(
                f"not one of the {len(manifest)} videos has a caption; mask without text: --mask.kind tube"
            )
        table = table.filter(pa.array(bool(captions) for captions in texts))
        note = f"{len(missing)} videos without a caption are left out"
    return Manifest(table, manifest.root), note


def _some(paths: pa.ChunkedArray, rows: Sequence[int]) -> str:
    return ", ".join(paths[row].as_py() for row in rows[:3]) + (" …" if len(rows) > 3 else "")
