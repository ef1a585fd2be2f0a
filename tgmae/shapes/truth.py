"""The ground truth of the shapes clips, patch by patch, to compare masks with.

Dimensions: T frames, S slots, N patches per slot, H W pixels of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray

from dali_pipelines.types import ClipRequest
from tgmae.shapes.scenes import MovingShape, regenerate_objects


def read_objects(folder: Path) -> dict[str, list[MovingShape]]:
    """Return the objects of every clip of a shapes folder, by the clip's path. Object i is what caption i names.

    The objects are regenerated from the seed that boxes.parquet holds. Raises ValueError if it holds none: an older
    version wrote the file, or compacting the data set changed its frames.
    """
    file = folder / "boxes.parquet"
    table = pq.read_table(file)
    metadata = table.schema.metadata or {}
    if b"seed" not in metadata or b"num_objects" not in metadata:
        raise ValueError(
            f"{file} does not say which seed its clips were drawn from; use the data set from before it was compacted, "
            "or generate it again (tgmae-data shapes)"
        )
    seed, num_objects = int(metadata[b"seed"]), int(metadata[b"num_objects"])
    paths = dict.fromkeys(table.column("path").to_pylist())
    return {path: regenerate_objects(seed, int(Path(path).stem), num_objects) for path in paths}


def object_coverage(
    obj: MovingShape,
    request: ClipRequest,
    image_size: int,
    patch_size: int,
    tubelet_size: int,
    frames_per_tubelet: int | None = None,
    *,
    on_top: Sequence[MovingShape] = (),
) -> NDArray[np.float32]:
    """Return the share of each patch that `obj` covers after the request's crop, resize and flip: float32 [S, N].

    frames_per_tubelet  take the mean over only the first so many frames of each tubelet; None takes all of them
    on_top              objects in front of `obj`: where they cover it, it is not seen and does not count

    Raises ValueError if the clip is not a whole number of tubelets, or a frame not a whole number of patches.
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
    shares = {number: _seen(obj, number, on_top) for number in set(request.frames)}
    covered = torch.from_numpy(np.stack([shares[number] for number in request.frames]))  # [T, H, W]
    box = request.crop
    covered = covered[None, :, box.y : box.y + box.height, box.x : box.x + box.width]
    # The resize of `pyav_pipeline.read_clip`, so that edges lie where they lie in the clip.
    covered = F.interpolate(covered, (image_size, image_size), mode="bilinear", antialias=True)[0]
    if request.flip:
        covered = covered.flip(-1)
    patches = F.avg_pool2d(covered, patch_size)  # [T, rows, columns]
    slots = rearrange(patches, "(s t) h w -> s t (h w)", t=tubelet_size)
    coverage: NDArray[np.float32] = slots[:, :taken].mean(dim=1).numpy()
    return coverage


def _seen(obj: MovingShape, frame: int, on_top: Sequence[MovingShape]) -> NDArray[np.float32]:
    """Return the share of each pixel of a frame that shows the object, float32 [H, W]."""
    share = obj.coverage(frame)
    for other in on_top:
        share = share * (1 - other.coverage(frame))
    return share.astype(np.float32)
