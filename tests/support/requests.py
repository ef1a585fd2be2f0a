"""Requests and plans made by hand, and the work of a decode worker without its process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.nvdec import CodecLimits
from dali_pipelines.types import BatchSampler, ClipRequest, CropBox
from dali_pipelines.workers.clip_worker import ClipWorker, Prepared
from tgmae.data.manifest import Manifest


def full_crop(manifest: Manifest, row: int) -> CropBox:
    return CropBox(x=0, y=0, width=manifest[row].width, height=manifest[row].height)


def request(manifest: Manifest, row: int, frames: tuple[int, ...], **changes: object) -> ClipRequest:
    plain = ClipRequest(
        row=row, epoch=0, position=row, frames=frames, crop=full_crop(manifest, row), flip=False, caption=0, mask_seed=0
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


class Plan:
    """The same requests in every batch; picklable for the worker processes."""

    def __init__(self, requests: tuple[ClipRequest, ...]) -> None:
        self.requests = requests

    def __call__(self, batch: int) -> tuple[ClipRequest, ...]:
        return self.requests


def make_worker(
    manifest: Manifest, sampler: BatchSampler, limits: Mapping[str, CodecLimits] | None, size: int = 64
) -> ClipWorker:
    """Make the work of a pool of batches without repeat."""
    shape = 1, len(sampler(0)), 1, len(sampler(0)[0].frames), size, size, 3
    return ClipWorker(videos=manifest, sampler=sampler, limits=limits, shape=shape)


def prepare(manifest: Manifest, wanted: ClipRequest, size: int = 32) -> tuple[Prepared, NDArray[np.uint8]]:
    """Do one decode as a worker does for DALI on a CPU; return what it hands over, and its pixels [T, S, S, 3]."""
    worker = make_worker(manifest, Plan((wanted,)), None, size)
    pixels = np.zeros(worker.shape[2:], np.uint8)
    return worker.prepare((wanted,), True, pixels), pixels[0]
