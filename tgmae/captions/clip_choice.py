"""Which CLIP fits a data set: the demo's tiny CLIP knows the demo's shapes and nothing else.

Presets name a CLIP. Commands without a preset take `default_clip`, and every command that scores says `advise_clip`.
"""

from __future__ import annotations

from pathlib import Path

from engines.config import CLIPConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.data.mixing.joined import data_sets

SHAPES = "shapes"  # --clip.model of the demo's CLIP, and source of the captions of the demo's data


def default_clip(manifest: Path | None) -> str:
    """Return the --clip.model to use where none is named: the demo's for the demo's data, a real one otherwise."""
    try:
        fits = manifest is not None and shows_shapes(read_manifest(manifest))
    except (ValueError, OSError):  # whoever reads the manifest next says what is wrong with it
        fits = False
    return SHAPES if fits else CLIPConfig().model


def advise_clip(is_demos: bool, manifest: Manifest) -> str:
    """Return a warning where the demo's CLIP meets other videos, "" otherwise."""
    if not is_demos or all(shows_shapes(one.manifest) for one in data_sets(manifest)):
        return ""
    return (
        "these videos are not the demo's shapes, and --clip.model shapes knows nothing else: its scores mean nothing "
        f"here; use a real CLIP, such as --clip.model {CLIPConfig().model}, or the preset of these videos"
    )


def shows_shapes(manifest: Manifest) -> bool:
    """Return whether `tgmae-data shapes` made these videos, by the source of the captions or its file of boxes."""
    sources = {caption.source for captions in manifest.captions() for caption in captions}
    return sources == {SHAPES} or (manifest.root / "boxes.parquet").exists()
