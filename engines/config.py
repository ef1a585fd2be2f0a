"""Which CLIP scores patches, and what runs it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LastBlock = Literal["maskclip", "sclip", "clearclip", "naclip"]
# The tiny CLIP of the demo data; `make tiny-clip` trains it again.
SHAPES_CLIP = Path(__file__).resolve().parent / "tiny_clip"
HUB_PREFIX = "hf-hub:"  # open_clip's, before ORGANISATION/NAME
_TINY_BYTES = 2**24  # of weights: the demo's have 3.5 MB, ViT-B/32 600
EngineName = Literal["torch", "onnxruntime", "tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """The CLIP that scores patches against captions, and the engine that runs it."""

    # An open_clip model name, hf-hub:ORG/NAME, a folder saved by open_clip, or "shapes": the demo's tiny CLIP.
    model: str = "ViT-B-32-quickgelu"
    weights: str = "openai"  # open_clip's tag of the weights, or a checkpoint file. A folder has its own weights.
    tag: str | None = None  # How a file of weights was trained: open_clip's tag of the same weights, or "default".
    trust_code: bool = False  # Load a TorchScript archive that OpenAI did not publish: this runs code from it.
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

    @property
    def folder(self) -> Path | None:
        """The folder that holds the CLIP; None where `model` names one in another way."""
        folder = SHAPES_CLIP if self.model == "shapes" else Path(self.model)
        return folder if folder.is_dir() else None

    @property
    def is_demos(self) -> bool:
        """Whether this is the tiny CLIP that knows nothing but the demo's shapes."""
        return self.model == "shapes" or Path(self.model).resolve() == SHAPES_CLIP

    @property
    def is_local(self) -> bool:
        """Whether it can be loaded without a network."""
        return self.folder is not None or Path(self.weights).is_file()

    @property
    def is_tiny(self) -> bool:
        """Whether its weights are at hand and as few as those of the demo's: it scores a clip in less than a step."""
        if self.folder is not None:
            files = [path for part in ("*.safetensors", "*.bin") for path in self.folder.glob(part)]
        else:
            files = [path for path in [Path(self.weights)] if path.is_file()]
        return bool(files) and sum(path.stat().st_size for path in files) <= _TINY_BYTES

    def identity(self) -> str:
        """Name the CLIP without loading it: model, weights, and a digest of local files. Reads these files.

        An equal identity means the same CLIP. A copied folder has the same one.
        """
        if self.folder is not None:
            parts = ("*.safetensors", "*.bin", "open_clip_config.json")  # the last names architecture and normalisation
            return " ".join(["folder", *(_digest(path) for part in parts for path in sorted(self.folder.glob(part)))])
        if self.model.startswith(HUB_PREFIX):
            return self.model
        if Path(self.weights).is_file():
            return " ".join([self.model, _digest(Path(self.weights)), *filter(None, [self.tag])])
        return f"{self.model} {self.weights}"

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"--clip.batch must be at least 1, got {self.batch}")
        if self.precision in ("bf16", "fp8") and self.engine != "torch":
            raise ValueError(
                f"--clip.precision {self.precision} needs --clip.engine torch, got {self.engine}; use "
                "--clip.engine torch or --clip.precision fp16"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.suffix}:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


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
