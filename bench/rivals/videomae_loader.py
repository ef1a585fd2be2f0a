"""A reimplementation of VideoMAE's pretraining loader, which bench/loader.py compares ours with.

A torch Dataset runs in DataLoader workers. decord (or PyAV) decodes whole frames to RGB, and PIL crops and resizes each
of them. The frames are stacked, converted to float32 and normalised, numpy draws a tube mask, and default_collate makes
the batch. Windows and crops come from requests of tgmae.data.sampling, so that both loaders do the same work.

Source: datasets.py, kinetics.py, transforms.py and masking_generator.py of MCG-NJU/VideoMAE: their behaviour, not their
code.

Dimensions: B clips, T frames, H W pixels, N patches a slot, S slots.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dali_pipelines.types import ClipRequest, CropBox, Video, VideoTable
from dali_pipelines.video.decode import decode_frames
from dali_pipelines.workers.processes import end_with_parent
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig

Decoder = Literal["decord", "PyAV"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
INSTALL_DECORD = "pip install decord==0.6.0"


def find_decoders() -> list[Decoder]:
    """Return the decoders that are installed, without importing any: decord brings its own FFmpeg."""
    return ["decord", "PyAV"] if importlib.util.find_spec("decord") else ["PyAV"]


def decode_with_decord(file: str, frames: Sequence[int]) -> NDArray[np.uint8]:
    """Return RGB frames uint8 [T, H, W, 3]; decord decodes and converts in one call."""
    decord = importlib.import_module("decord")
    found: NDArray[np.uint8] = decord.VideoReader(file, num_threads=1).get_batch(list(frames)).asnumpy()
    return found


def decode_only(file: str, video: Video, request: ClipRequest) -> None:
    """Decode a clip's frames with PyAV and do nothing with them."""
    for _ in decode_frames(file, video, request.frames, seek=True):
        pass


def read_frames(decoder: Decoder, videos: VideoTable, request: ClipRequest) -> list[Image.Image]:
    """Decode the T whole frames of a clip."""
    file = videos.file(request.row)
    if decoder == "decord":
        return [Image.fromarray(frame) for frame in decode_with_decord(file, request.frames)]
    decoded = decode_frames(file, videos[request.row], request.frames, seek=True)
    found = {number: Image.fromarray(frame.to_ndarray(format="rgb24", threads=1)) for number, frame in decoded}
    return [found[number] for number in request.frames]


def crop_and_resize(frames: Sequence[Image.Image], crop: CropBox, size: int) -> list[Image.Image]:
    """Do the last step of a multi-scale crop: T frames of size × size."""
    box = (crop.x, crop.y, crop.x + crop.width, crop.y + crop.height)
    return [frame.crop(box).resize((size, size), Image.Resampling.BILINEAR) for frame in frames]


def to_normalised(frames: Sequence[Image.Image]) -> Tensor:
    """Turn T frames into float32 [3, T, H, W]: stack by channels, move channels to the front, scale, normalise each."""
    stacked = np.concatenate([np.asarray(frame) for frame in frames], axis=2)
    clip = torch.from_numpy(stacked).permute(2, 0, 1).contiguous().float().div(255)
    for number, channel in enumerate(clip):
        channel.sub_(MEAN[number % 3]).div_(STD[number % 3])
    return clip.view(len(frames), 3, *clip.shape[1:]).transpose(0, 1)


def tube_mask(seed: int, model: ModelConfig, mask: MaskConfig) -> NDArray[np.float64]:
    """Draw a mask [S · N], 1 where a token is masked; all slots are alike."""
    slot = np.zeros(model.patches_per_slot)
    slot[: mask.masked_per_slot(model.patches_per_slot)] = 1
    np.random.default_rng(seed).shuffle(slot)
    return np.tile(slot, model.num_slots)


def time_clip(
    decoder: Decoder, videos: VideoTable, request: ClipRequest, model: ModelConfig, mask: MaskConfig,
    timed: Callable[[str, Callable[[], Any]], Any],
) -> None:  # fmt: skip
    """Pass every stage of one clip to `timed(stage, work)`, which must return what `work` returns.

    PyAV also decodes without converting to RGB; decord cannot.
    """
    if decoder == "PyAV":
        timed("decode", partial(decode_only, videos.file(request.row), videos[request.row], request))
    frames = timed("decode, to RGB", partial(read_frames, decoder, videos, request))
    small = timed("crop and resize", partial(crop_and_resize, frames, request.crop, model.image_size))
    timed("to float, normalise", partial(to_normalised, small))
    timed("mask", partial(tube_mask, request.mask_seed, model, mask))


class VideoMAEDataset(Dataset[tuple[Tensor, NDArray[np.float64]]]):
    """One clip for each request: float32 [3, T, H, W] and its mask [S · N]."""

    def __init__(
        self, decoder: Decoder, videos: VideoTable, requests: Sequence[ClipRequest], model: ModelConfig,
        mask: MaskConfig,
    ) -> None:  # fmt: skip
        self.decoder, self.videos, self.requests, self.model, self.mask = decoder, videos, requests, model, mask

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, place: int) -> tuple[Tensor, NDArray[np.float64]]:
        request = self.requests[place]
        frames = read_frames(self.decoder, self.videos, request)
        clip = to_normalised(crop_and_resize(frames, request.crop, self.model.image_size))
        return clip, tube_mask(request.mask_seed, self.model, self.mask)


def make_videomae_loader(
    dataset: VideoMAEDataset, batch_size: int, num_workers: int, pin_memory: bool
) -> Iterator[Any]:
    """Yield batches (float32 [B, 3, T, H, W], float64 [B, S · N]) in the order of the requests."""
    loader = DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory, drop_last=True,
        multiprocessing_context="spawn" if num_workers else None, worker_init_fn=_start_worker,
    )  # fmt: skip
    return iter(loader)


def _start_worker(_: int) -> None:
    end_with_parent()
