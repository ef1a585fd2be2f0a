"""Manifests whose rows are segments of files, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dali_pipelines.types import Caption
from tgmae.data.manifest import Manifest, read_manifest, write_manifest


def cut_segments(manifest: Manifest, out: Path, segments: Sequence[tuple[int, tuple[int, int] | None]]) -> Manifest:
    """Write a manifest with one row per (row of `manifest`, segment) to `out`, and read it back.

    A row keeps the captions of its file. Where that has none, its caption names its frames, from the source "test".
    """
    videos = []
    for row, segment in segments:
        video = replace(manifest[row], segment=segment)
        captions = video.captions or (Caption(f"frames {video.start} to {video.end}", "test"),)
        videos.append(replace(video, captions=captions))
    write_manifest(out, videos, manifest.root)
    return read_manifest(out)
