"""A contact sheet of a data set."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from dali_pipelines.video.decode import DecodeError, decode_frames
from tgmae.data.manifest import Manifest
from tgmae.pictures.figures import save_figure, shorten


def draw_contact_sheet(manifest: Manifest, path: Path, count: int, seed: int) -> int:
    """PNG of the middle frames of up to `count` videos drawn at random; returns how many could be read."""
    if count < 1:
        raise ValueError(f"expected at least one video on the sheet, got {count}")
    rows = sorted(np.random.default_rng(seed).permutation(len(manifest))[:count].tolist())
    pictures: list[tuple[NDArray[np.uint8], str]] = []
    for row in rows:
        video = manifest[row]
        try:
            [(_, frame)] = decode_frames(manifest.file(row), video, [video.start + video.length // 2], seek=True)
        except DecodeError as error:
            pictures.append((np.zeros((9, 16, 3), np.uint8), f"{shorten(video.path)}\n{shorten(str(error))}"))
            continue
        picture = np.rot90(frame.to_ndarray(format="rgb24"), -video.rotation // 90).astype(np.uint8)
        name = f"{video.label}: {Path(video.path).name}" if video.label else video.path
        words = shorten(video.captions[0].text if video.captions else name)
        pictures.append((picture, f"{words}\n{video.width}×{video.height} {video.codec}, {video.length} frames"))
    columns = min(6, len(pictures))
    lines = -(-len(pictures) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.6 * columns, 2.4 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (picture, title) in zip(axes.flat, pictures, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=7, parse_math=False)
    save_figure(figure, path, dpi=90)
    return len(pictures)
