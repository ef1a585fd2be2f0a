"""What to do with videos that have no caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

from dali_pipelines.types import Caption
from tgmae.captions.oracle import read_label
from tgmae.config.captions import CaptionsConfig
from tgmae.data.manifest import Manifest, count_videos

ALL = CaptionsConfig()


def require_captions(
    manifest: Manifest, no_caption: Literal["error", "exclude", "label"], without_text: str = "",
    chosen: CaptionsConfig = ALL,
) -> tuple[Manifest, str]:  # fmt: skip
    """Drop empty captions, then treat the videos left without any as `no_caption` says.

    without_text  how the command does without captions, for messages, such as "train without text: --mask.kind tube";
                  "" where it cannot
    chosen        which captions count; the others stay where they are, so that score maps fit every choice

    Returns a manifest in which every video has a caption, and a note about what was done ("" for nothing).
    Raises ValueError, naming the videos, where missing captions are an error, where a label is missing too, where
    no video has a caption, and where no caption has a source that was asked for.
    """
    captions = [
        [Caption(caption.text.strip(), caption.source) for caption in row if caption.text.strip()]
        for row in manifest.captions()
    ]
    _check_sources(Counter(caption.source for row in captions for caption in row), chosen)
    missing = [row for row, found in enumerate(captions) if not any(map(chosen.accepts, found))]
    names = manifest.names()
    labels = [read_label(label) for label in manifest.table.column("label").to_pylist()]
    unlabelled = [row for row in missing if not labels[row]]
    if missing and no_caption == "error":
        advice = ["leave them out: --mask.no-caption exclude"] * (len(missing) < len(manifest))
        advice += ["use their labels as captions: --mask.no-caption label"] * (not unlabelled)
        advice += [without_text] * bool(without_text)
        raise ValueError(
            f"{len(missing)} of {count_videos(len(manifest))} {'has' if len(missing) == 1 else 'have'} no caption"
            + f" of the source{'s' * (len(chosen.sources) > 1)} {', '.join(chosen.sources)}" * bool(chosen.sources)
            + ", "
            f"such as {_some(names, missing)}. "
            + "; or ".join(["Captions come with tgmae-caption, or tgmae-data index FOLDER --csv FILE", *advice])
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
        manifest = Manifest(
            manifest.table.filter(pa.array(any(map(chosen.accepts, found)) for found in captions)), manifest.root
        )
        note = f"{count_videos(len(missing))} without a caption {'is' if len(missing) == 1 else 'are'} left out"
    return manifest, note


def _check_sources(found: Counter[str], chosen: CaptionsConfig) -> None:
    """Raise ValueError for a source that was asked for and that no caption has, while there are captions of others."""
    for source in chosen.sources:
        if found and source not in found:
            there = ", ".join(f"{name or '(none)'} ({count})" for name, count in found.most_common())
            raise ValueError(
                f"no caption has the source {source!r} of --captions.sources; these videos have captions of {there}"
            )


def _some(names: Sequence[str], rows: Sequence[int]) -> str:
    return ", ".join(names[row] for row in rows[:3])
