"""What to do with videos that have no caption."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

from dali_pipelines.types import Caption
from tgmae.data.manifest import Manifest, count_videos


def require_captions(
    manifest: Manifest, no_caption: Literal["error", "exclude", "label"], without_text: str = ""
) -> tuple[Manifest, str]:
    """Drop empty captions, then treat the videos left without any as `no_caption` says.

    without_text  how the command does without captions, for messages, such as "train without text: --mask.kind tube";
                  "" where it cannot

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
    labels = [_spell_out(str(label)) for label in manifest.table.column("label").to_pylist()]
    unlabelled = [row for row in missing if not labels[row]]
    if missing and no_caption == "error":
        advice = ["leave them out: --mask.no-caption exclude"] * (len(missing) < len(manifest))
        advice += ["use their labels as captions: --mask.no-caption label"] * (not unlabelled)
        advice += [without_text] * bool(without_text)
        raise ValueError(
            f"{len(missing)} of {count_videos(len(manifest))} {'has' if len(missing) == 1 else 'have'} no caption, "
            f"such as {_some(names, missing)}. "
            + "; or ".join(["Captions come with tgmae-data index FOLDER --csv FILE", *advice])
        )
    note = ""
    if missing and no_caption == "label":
        if unlabelled:
            raise ValueError(
                f"{count_videos(len(unlabelled))} {'has' if len(unlabelled) == 1 else 'have'} neither caption nor "
                f"label, such as {_some(names, unlabelled)}; leave them out with --mask.no-caption exclude"
            )
        for row in missing:
            captions[row] = [Caption(labels[row], "label")]
        use = "uses its" if len(missing) == 1 else "use their"
        note = f"{count_videos(len(missing))} without a caption {use} label"
    manifest = manifest.with_captions(captions)
    if missing and no_caption == "exclude":
        if len(missing) == len(manifest):
            raise ValueError(
                f"none of the {count_videos(len(manifest))} has a caption" + f"; {without_text}" * bool(without_text)
            )
        manifest = Manifest(manifest.table.filter(pa.array(bool(texts) for texts in captions)), manifest.root)
        note = f"{count_videos(len(missing))} without a caption {'is' if len(missing) == 1 else 'are'} left out"
    return manifest, note


def _spell_out(label: str) -> str:
    """Return the name of a class as words: brush_hair and ApplyEyeMakeup are names of folders."""
    words = label.replace("_", " ").strip()
    return words if " " in words else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words)


def _some(names: Sequence[str], rows: Sequence[int]) -> str:
    return ", ".join(names[row] for row in rows[:3])
