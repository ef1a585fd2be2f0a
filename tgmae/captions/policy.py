"""What to do with videos that have no caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

from dali_pipelines.types import Caption
from tgmae.data.manifest import Manifest


def require_captions(manifest: Manifest, no_caption: Literal["error", "exclude", "label"]) -> tuple[Manifest, str]:
    """Drop empty captions, then treat the videos left without any as `no_caption` says.

    Returns a manifest in which every video has a caption, and a note about what was done ("" for nothing).
    Raises ValueError, naming the videos, where missing captions are an error, where a label is missing too, and where
    no video has a caption.
    """
    captions = [
        [Caption(caption.text.strip(), caption.source) for caption in row if caption.text.strip()]
        for row in manifest.captions()
    ]
    missing = [row for row, texts in enumerate(captions) if not texts]
    names = manifest.names()
    labels = [str(label).replace("_", " ").strip() for label in manifest.table.column("label").to_pylist()]
    unlabelled = [row for row in missing if not labels[row]]
    if missing and no_caption == "error":
        advice = ["leave them out: --mask.no-caption exclude"] * (len(missing) < len(manifest))
        advice += ["use their labels as captions: --mask.no-caption label"] * (not unlabelled)
        advice += ["train without text: --mask.kind tube"]
        raise ValueError(
            f"{len(missing)} of {len(manifest)} videos have no caption, such as {_some(names, missing)}. Captions come "
            f"with tgmae-data index FOLDER --csv FILE; or {'; or '.join(advice)}"
        )
    note = ""
    if missing and no_caption == "label":
        if unlabelled:
            raise ValueError(
                f"{len(unlabelled)} videos have neither caption nor label, such as {_some(names, unlabelled)}; "
                "leave them out with --mask.no-caption exclude"
            )
        for row in missing:
            captions[row] = [Caption(labels[row], "label")]
        note = f"{len(missing)} videos without a caption use their label"
    manifest = manifest.with_captions(captions)
    if missing and no_caption == "exclude":
        if len(missing) == len(manifest):
            raise ValueError(f"none of the {len(manifest)} videos has a caption; train without text: --mask.kind tube")
        manifest = Manifest(manifest.table.filter(pa.array(bool(texts) for texts in captions)), manifest.root)
        note = f"{len(missing)} videos without a caption are left out"
    return manifest, note


def _some(names: Sequence[str], rows: Sequence[int]) -> str:
    return ", ".join(names[row] for row in rows[:3]) + (" …" if len(rows) > 3 else "")
