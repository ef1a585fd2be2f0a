"""How videos are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Where videos are decoded, and how many processes and threads share the work."""

    # Where --pipeline dali decodes. auto uses the GPU's decoder (NVDEC) if there is one, and the CPU otherwise.
    decode: Literal["auto", "gpu", "cpu"] = "auto"
    # Clips cut from one decode, each with its own crop, flip, caption and mask.
    repeat: int = 1
    # Worker processes that read files, and decode what DALI does not; all DALI pipelines share them, at least one each.
    num_workers: int = 2
    # Batches that workers prepare ahead; all DALI pipelines share them, at least one each.
    prefetch: int = 2
    # DALI pipelines that serve batches round-robin. Default: 4 if NVDEC decodes, otherwise 1.
    pipelines: int | None = None
    # DALI decoding threads per pipeline. Default: enough for two clips per NVDEC engine; on a CPU, as many as workers.
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("repeat", "num_workers", "prefetch", "pipelines", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--data.{name.replace('_', '-')} must be at least 1, got {value}")
