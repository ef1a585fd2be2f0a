"""Frozen features: what an encoder makes of one clip of every video, with all tokens visible and without gradients.

Dimensions: B clips, T frames, H W pixels, D features, n clips that could be read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_pipelines.open import PipelineKind, open_pipeline
from dali_pipelines.types import ClipRequest, CropBox, SkippedVideo, Video
from engines.progress import progress_bar
from tgmae.config.data import DataConfig
from tgmae.config.model import ModelConfig
from tgmae.data.manifest import Manifest
from tgmae.data.sampling import FixedClips, clip_span
from tgmae.model.attention import choose_attention
from tgmae.model.initial_weights import read_initial_weights
from tgmae.model.videomae import VideoMAE

Pool = Callable[[Tensor], Tensor]  # uint8 frames [B, T, H, W, 3] → features [B, D], both on one device


@dataclass(frozen=True, kw_only=True, repr=False)
class Features:
    """Features of the clips that could be read, on the CPU, and the videos that could not.

    rows     int64 [n], rows of the manifest, ascending
    vectors  [n, D], in the order of `rows`
    """

    rows: NDArray[np.int64]
    vectors: NDArray[np.generic]
    skipped: tuple[SkippedVideo, ...]

    def __repr__(self) -> str:
        return f"Features({self.vectors.dtype} {list(self.vectors.shape)}, {len(self.skipped)} skipped)"


def load_network(source: str, config: ModelConfig, device: torch.device) -> VideoMAE:
    """Load the network whose weights `source` names, as --init-from does, for evaluation.

    Raises FileNotFoundError or OSError where there are none, and ValueError where they are of another network.
    """
    found = read_initial_weights(source, config)
    if found.norm_eps is not None:
        config = replace(config, norm_eps=found.norm_eps)
    network = VideoMAE(config, choose_attention(config.attention, device))
    network.load_state_dict(found.weights, strict=False)  # an encoder alone leaves the decoder fresh, which is not run
    return network.to(device).eval().requires_grad_(False)


def pool_tokens(network: VideoMAE, frames: Tensor) -> Tensor:
    """Return the mean over all tokens of the encoder's normed output, float32 [B, D]."""
    tokens = torch.arange(network.config.num_tokens, dtype=torch.int32, device=frames.device)
    with torch.no_grad():
        return network.encode(frames, tokens.expand(len(frames), -1).contiguous()).float().mean(1)


def extract_features(
    pool: VideoMAE | Pool, manifest: Manifest, data: DataConfig, model: ModelConfig, device: torch.device,
    *, pipeline: PipelineKind = "dali", batch_size: int = 32,
) -> Features:  # fmt: skip
    """Decode the central clip of every video (`centre_clip`) through the training loader's pipeline, and pool it.

    pool   a network, whose tokens `pool_tokens` averages, or any function of the frames

    A video that cannot be read is left out and named in the result. Raises ValueError where none of the videos of
    several batches can be read, and where the pipeline cannot run here.
    """
    requests = tuple(centre_clip(manifest[row], row, data, model.num_frames) for row in range(len(manifest)))
    size = min(batch_size, len(requests))
    compute = partial(pool_tokens, pool) if isinstance(pool, VideoMAE) else pool
    clips = FixedClips(requests, size)
    found: list[Tensor] = []
    rows: list[int] = []
    skipped: dict[int, SkippedVideo] = {}
    options = replace(data, repeat=1)
    with closing(open_pipeline(pipeline, manifest, clips, options, model.image_size, 0, device)) as opened:
        for first in progress_bar(range(0, len(requests), size), desc="features", unit="batch"):
            batch = opened.next_batch()
            unread = {video.row: video for video in batch.skipped}
            # Copies of other clips stand in for those, and the first clips come again where the last batch is too long.
            kept = [place for place in range(min(size, len(requests) - first)) if first + place not in unread]
            skipped |= unread
            rows += [first + place for place in kept]
            found.append(compute(batch.frames.to(device))[kept].cpu())
    return Features(
        rows=np.array(rows), vectors=torch.cat(found).numpy(), skipped=tuple(skipped[row] for row in sorted(skipped))
    )  # fmt: skip


def centre_clip(video: Video, row: int, data: DataConfig, num_frames: int) -> ClipRequest:
    """Return the request of a video's middle: the frames of its middle, in the largest square at the frame's centre."""
    side = min(video.width, video.height)
    box = CropBox(x=(video.width - side) // 2, y=(video.height - side) // 2, width=side, height=side)
    frames = centre_frames(video, data, num_frames)
    return ClipRequest(row=row, epoch=0, position=row, frames=frames, crop=box, flip=False, caption=0, mask_seed=0)


def centre_frames(video: Video, data: DataConfig, num_frames: int) -> tuple[int, ...]:
    """Return the frame numbers of a video's middle, chosen as `sample_frames` does, without chance.

    dense    `stride` apart, as many frames before the first one as behind the last; a shorter video as in training
    uniform  the middle frame of each of num_frames equal parts; a shorter video as in training
    """
    if data.sampling == "dense":
        start = video.start + max(video.length - clip_span(data, num_frames), 0) // 2
        last = start + (video.end - 1 - start) // data.stride * data.stride
        return tuple(min(start + step * data.stride, last) for step in range(num_frames))
    if video.length < num_frames:
        return tuple(video.start + min(step, video.length - 1) for step in range(num_frames))
    edges = video.start + np.arange(num_frames + 1) * video.length // num_frames
    return tuple(int(frame) for frame in (edges[:-1] + edges[1:] - 1) // 2)
