"""What the shapes clips truly show, patch by patch, so that a mask can be judged against it.

Dimensions: T frames, S slots, N patches a slot, H W pixels of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dali_pipelines.types import ClipRequest
from tgmae.shapes.scenes import MovingShape, clip_objects


def read_objects(folder: Path) -> dict[str, list[MovingShape]]:
    """The objects of every clip of a shapes folder, by the clip's path; object i is what caption i names.

    boxes.parquet holds the seed they were drawn from; they are drawn again from it. Raises ValueError where the file
    says nothing of a seed (an older version wrote it, or compacting changed pictures or frames).
    """
    file = folder / "boxes.parquet"
    table = pq.read_table(file)
    metadata = table.schema.metadata or {}
    if b"seed" not in metadata or b"num_objects" not in metadata:
        raise ValueError(
            f"{file} does not say which seed its clips were drawn from; take the data set before it was compacted, "
            "or make it again"
        )
    seed, num_objects = int(metadata[b"seed"]), int(metadata[b"num_objects"])
    paths = dict.fromkeys(table.column("path").to_pylist())
    return {path: clip_objects(seed, int(Path(path).stem), num_objects) for path in paths}


def object_coverage(
    thing: MovingShape,
    request: ClipRequest,
    image_size: int,
    patch_size: int,
    tubelet_size: int,
    frames_per_tubelet: int | None = None,
    *,
    on_top: Sequence[MovingShape] = (),
) -> NDArray[np.float32]:
    """Share of each patch that an object covers, after the request's own crop, resize and flip: float32 [S, N].

    frames_per_tubelet  the mean is over the first so many frames of each tubelet; None takes all of them
    on_top              objects drawn later: where they cover `thing` it is not seen, and does not count

    Raises ValueError where the clip is no whole number of tubelets or the picture no whole number of patches.
    """
    num_frames = len(request.frames)
    if num_frames % tubelet_size or image_size % patch_size:
        raise ValueError(
            f"expected a whole number of tubelets and patches, got {num_frames} frames in tubelets of {tubelet_size} "
            f"and {image_size} pixels in patches of {patch_size}"
        )
    taken = tubelet_size if frames_per_tubelet is None else frames_per_tubelet
    if not 1 <= taken <= tubelet_size:
        raise ValueError(f"expected 1 to {tubelet_size} frames of each tubelet, got {taken}")
    shares = {number: _seen(thing, number, on_top) for number in set(request.frames)}
    pictures = torch.from_numpy(np.stack([shares[number] for number in request.frames]))  # [T, H, W]
    box = request.crop
    pictures = pictures[None, :, box.y : box.y + box.height, box.x : box.x + box.width]
    # The resize of `reference.read_clip`, so that an edge lies where the pixels put it.
    pictures = F.interpolate(pictures, (image_size, image_size), mode="bilinear", antialias=True)[0]
    if request.flip:
        pictures = pictures.flip(-1)
    patches = F.avg_pool2d(pictures, patch_size).flatten(1)  # [T, N]
    slots = patches.view(-1, tubelet_size, patches.shape[1])[:, :taken].mean(dim=1)
    coverage: NDArray[np.float32] = slots.numpy()
    return coverage


def _seen(thing: MovingShape, frame: int, on_top: Sequence[MovingShape]) -> NDArray[np.float32]:
    """Share of each pixel of a frame that shows the object, [H, W]."""
    share = thing.coverage(frame)
    for other in on_top:
        share = share * (1 - other.coverage(frame))
    return share.astype(np.float32)
