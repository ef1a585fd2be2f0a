"""Open the pipeline that a configuration names."""

from __future__ import annotations

from typing import Literal

import torch

from dali_pipelines.config import DecodeConfig
from dali_pipelines.types import BatchSampler, ClipPipeline, VideoTable

PipelineKind = Literal["dali", "pyav"]


def open_pipeline(
    kind: PipelineKind,
    videos: VideoTable,
    sampler: BatchSampler,
    config: DecodeConfig,
    size: int,
    first_batch: int,
    device: torch.device,
) -> ClipPipeline:
    """Open a pipeline; DALI's worker processes are starting when this returns.

    videos       the manifest        sampler   gives the requests of batch 0, 1, …
    size         height and width of the clips, in pixels
    first_batch  batch to start from, for resuming
    device       device for which clips are made; "pyav" leaves them on the CPU

    Raises ValueError where the pipeline cannot run here.
    """
    if kind == "pyav":
        if config.decode == "gpu":
            raise ValueError("--pipeline pyav decodes on the CPU; use --pipeline dali, or drop --data.decode gpu")
        from dali_pipelines.pyav_pipeline import PyavPipeline

        return PyavPipeline(videos, sampler, size, first_batch)
    try:
        from dali_pipelines.dali_pipeline import DaliPipeline
    except ImportError as error:
        raise ValueError(
            f"--pipeline dali cannot run: {error}. Install it with pip install nvidia-dali-cuda130, "
            "or use --pipeline pyav"
        ) from error
    return DaliPipeline(videos, sampler, config, size, first_batch, device)
