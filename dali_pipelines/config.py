"""How videos are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Where videos are decoded, and how many processes and threads share the work."""

    # Where --pipeline dali decodes: auto uses NVDEC where the GPU has it, and the CPU elsewhere.
    decode: Literal["auto", "gpu", "cpu"] = "auto"
    # Clips cut from one decode, each with its own crop, flip, caption and mask.
    repeat: int = 1
    # Worker processes that read files and decode what DALI does not, over all pipelines; each has at least one.
    num_workers: int = 2
    # Batches that workers prepare ahead, over all pipelines; each prepares at least one.
    prefetch: int = 2
    # DALI pipelines that serve batches round-robin. Default: 4 where NVDEC decodes, 1 elsewhere.
    pipelines: int | None = None
    # DALI decoding threads per pipeline. Default: two clips per NVDEC engine; on a CPU, as many as workers.
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("repeat", "num_workers", "prefetch", "pipelines", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--data.{name.replace('_', '-')} must be at least 1, got {value}")
