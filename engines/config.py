"""Which CLIP scores patches, and what runs it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LastBlock = Literal["maskclip", "sclip", "clearclip", "naclip"]
# The tiny CLIP of the demo data; `make tiny-clip` trains it again.
SHAPES_CLIP = Path(__file__).parent / "tiny_clip"
EngineName = Literal["torch", "onnxruntime", "tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """The CLIP that scores patches against captions, and the engine that runs it."""

    # An open_clip model name, a folder saved by open_clip, or "shapes": the tiny CLIP that comes with the demo.
    model: str = "ViT-B-32-quickgelu"
    weights: str = "openai"  # open_clip's tag of the weights, or a checkpoint file. A folder has its own weights.
    engine: EngineName = "torch"  # Library that runs CLIP's image encoder.
    # auto is fp16 on CUDA and fp32 on a CPU. bf16 and fp8 need the torch engine. fp8 runs 11/12 of the linear layers in
    # e4m3 and the rest in bf16; it needs compute capability 8.9, and is a slow simulation on a CPU.
    precision: Literal["auto", "fp16", "bf16", "fp8", "fp32"] = "auto"
    # Patches per forward pass. The dense scorer takes as many whole frames as contain that many patches. Default: 512
    # on a CPU, so that a pass stays in the cache; on CUDA, what fills the GPU (engines/auto_batch.py).
    batch: int | None = None
    # Replay full forward passes as a CUDA graph (torch engine on CUDA only).
    cuda_graph: bool = True
    cache_dir: Path = Path("~/.cache/tgmae")  # Folder for caption embeddings, ONNX graphs and TensorRT plans.

    def precision_on(self, device_type: str) -> Literal["fp16", "bf16", "fp8", "fp32"]:
        """Resolve `precision` for a device type, "cuda" or "cpu"."""
        if self.precision == "auto":
            return "fp16" if device_type == "cuda" else "fp32"
        return self.precision

    def identity(self) -> str:
        """Name the CLIP without loading it: model, weights, and size and modification time of local files.

        An equal identity means the same CLIP. Another identity may still be the same one (a copied folder, say).
        """
        folder = SHAPES_CLIP if self.model == "shapes" else Path(self.model)
        if folder.is_dir():
            parts = ("*.safetensors", "*.bin", "open_clip_config.json")  # the last names architecture and normalisation
            names, files = [self.model], sorted(path for part in parts for path in folder.glob(part))
        else:
            names, files = [self.model, self.weights], [Path(self.weights)]
        stats = [f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}" for path in files if (stat := _stat(path))]
        return " ".join(names + stats)

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"--clip.batch must be at least 1, got {self.batch}")
        if self.precision in ("bf16", "fp8") and self.engine != "torch":
            raise ValueError(
                f"--clip.precision {self.precision} needs --clip.engine torch, got {self.engine}; use "
                "--clip.engine torch or --clip.precision fp16"
            )


def _stat(path: Path) -> os.stat_result | None:
    return path.stat() if path.is_file() else None


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """Which network turns pixels into embeddings.

    kind        patch: every patch through CLIP by itself; dense: whole frames; student: a small distilled network
    last_block  how the dense tower changes CLIP's last block
    student     the file of a student; required for kind "student"
    """

    kind: Literal["patch", "dense", "student"]
    last_block: LastBlock = "clearclip"
    student: Path | None = None

    def __post_init__(self) -> None:
        assert self.kind != "student" or self.student is not None
