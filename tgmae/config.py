"""Configuration: frozen dataclasses. `tgmae-train PRESET --data.stride 2` changes a field of a preset.

The resolved configuration is written beside every run and inside every checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

MaskKind = Literal["tgm", "mgm", "mgm_box", "mgmae", "random", "tube"]
MOTION_KINDS = ("mgm", "mgm_box", "mgmae")
DEMO_MANIFEST = Path("data/shapes/manifest.parquet")  # made by the first `tgmae-train`


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Geometry of clip and network; the defaults are VideoMAE ViT-B."""

    image_size: int = 224  # pixels, height and width
    num_frames: int = 16
    patch_size: int = 16  # pixels
    tubelet_size: int = 2  # frames
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_width: int = 384
    decoder_depth: int = 4
    decoder_num_heads: int = 6
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    # xformers and cudnn run on CUDA only; auto takes xformers there and torch's scaled_dot_product_attention elsewhere.
    attention: Literal["auto", "xformers", "cudnn", "sdpa"] = "auto"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"model.{name} must be at least 1, got {value}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size must be a multiple of model.patch_size, got {self.image_size} and {self.patch_size}"
            )
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                "model.num_frames must be a multiple of model.tubelet_size, "
                f"got {self.num_frames} and {self.tubelet_size}"
            )
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}width"), getattr(self, f"{prefix}num_heads")
            if width % heads:
                raise ValueError(
                    f"model.{prefix}width must be a multiple of model.{prefix}num_heads, got {width} and {heads}"
                )

    @property
    def num_slots(self) -> int:
        return self.num_frames // self.tubelet_size

    @property
    def patches_per_slot(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        return self.num_slots * self.patches_per_slot

    @property
    def values_per_token(self) -> int:
        return self.tubelet_size * self.patch_size**2 * 3


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which videos, and how clips are cut from them."""

    manifest: Path = DEMO_MANIFEST  # made by `tgmae-data index`
    split: str = "train"  # rows of the manifest to train on; "" takes every row
    # dense: num_frames frames, `stride` apart, from a random start. uniform: one random frame from each of
    # num_frames equal segments (TSN).
    sampling: Literal["dense", "uniform"] = "dense"
    stride: int = 4  # frames
    crop_scales: tuple[float, ...] = (
        1.0,
        0.875,
        0.75,
        0.66,
    )  # of the short side; 1.0 alone keeps only the crop's place random
    flip: bool = False
    repeat: int = 1  # clips from one decode, each with its own crop, flip, caption and mask
    decode: Literal["auto", "gpu", "cpu"] = "auto"  # for --pipeline dali; auto takes the GPU where it has NVDEC
    captions: Literal["random", "first"] = "random"  # which of a video's captions goes with a clip
    # Processes that read files, and decode what DALI does not: of all pipelines together, at least one in each.
    num_workers: int = 2
    prefetch: int = 2  # batches that the workers run ahead, in all pipelines together, at least one in each
    # DALI pipelines that take turns with the batches; by default 4 where NVDEC decodes and 1 elsewhere.
    pipelines: int | None = None
    # DALI's decoding threads in each pipeline; by default two clips an NVDEC engine, on a CPU as many as workers.
    threads: int | None = None
    max_skipped: float = 0.05  # share of the videos that may turn out unreadable before the run stops; one always may

    def __post_init__(self) -> None:
        for name in ("stride", "repeat", "num_workers", "prefetch", "pipelines", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")
        if not self.crop_scales or not all(0 < scale <= 1 for scale in self.crop_scales):
            raise ValueError(f"data.crop_scales must lie in (0, 1], got {self.crop_scales}")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"data.max_skipped is a share between 0 and 1, got {self.max_skipped}")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Every mask is a score for each patch; the top patches of each slot are masked.

    tgm      likeness to the caption (Fan et al. 2024, section 3.3)
    mgm      what moves fastest (after Fan et al. 2023)
    mgm_box  a box on what moves fastest, carried along by it
    mgmae    all but what lies under random bumps that the motion carries along (Huang et al. 2023)
    random   every slot draws its own patches (ST-MAE)
    tube     all slots share one draw (VideoMAE)
    """

    kind: MaskKind = "tgm"
    ratio: float = 0.6  # of each slot's patches; floor(ratio · N) are masked
    order: Literal["top", "bottom"] = "top"  # bottom masks the patches that score lowest (the paper's table 5b)
    # For tgm. patch: each patch through CLIP, as the paper does. dense: whole frames through CLIP. cached: read what
    # `tgmae-data scores` computed. student: a small network made by `tgmae-engine distill`.
    scorer: Literal["patch", "dense", "cached", "student"] = "patch"
    frames_per_tubelet: Literal[1, 2] = 2  # 1 scores each tubelet's first frame, 2 averages over both
    dense: Literal["maskclip", "sclip", "clearclip", "naclip"] = "clearclip"  # CLIP's last block under scorer dense
    scores: Path | None = None  # folder made by `tgmae-data scores`, for scorer cached
    student: Path | None = None  # file made by `tgmae-engine distill`, for scorer student
    motion: Path | None = None  # folder made by `tgmae-data motion`, for mgm, mgm_box and mgmae
    flow: Path | None = None  # a torchvision RAFT checkpoint: mgmae then takes its motion from optical flow
    # Of videos without one: error names them, exclude trains without them, label takes the label for a caption.
    no_caption: Literal["error", "exclude", "label"] = "error"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"mask.ratio must lie strictly between 0 and 1, got {self.ratio}")
        if self.kind == "tgm":
            if self.scorer == "cached" and self.scores is None:
                raise ValueError("mask.scorer cached needs --mask.scores FOLDER; make it with: tgmae-data scores")
            if self.scorer == "student" and self.student is None:
                raise ValueError("mask.scorer student needs --mask.student FILE; make it with: tgmae-engine distill")

        elif self.kind in MOTION_KINDS and self.motion is None and not (self.kind == "mgmae" and self.flow):
            raise ValueError(
                f"mask.kind {self.kind} needs --mask.motion FOLDER; make it with: tgmae-data motion MANIFEST"
                + " (or give --mask.flow, a RAFT checkpoint)" * (self.kind == "mgmae")
            )

    def masked_per_slot(self, patches_per_slot: int) -> int:
        """floor(ratio · N), the number of masked patches in each slot."""
        # A product such as .7 · 10 may come out just below its whole number in binary.
        return math.floor(self.ratio * patches_per_slot + 1e-9)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The CLIP that scores patches against captions, and what runs it."""

    # An open_clip name, a folder that open_clip saved, or "shapes": the tiny CLIP that comes with the demo.
    model: str = "ViT-B-32-quickgelu"
    weights: str = "openai"  # open_clip's tag, or a checkpoint file; a folder brings its own
    engine: Literal["torch", "onnxruntime", "tensorrt", "tensorrt_rtx"] = "torch"
    # auto: fp16 on CUDA, fp32 on a CPU. fp8: 11 of 12 parts of the transformer's linear layers in e4m3, all else in
    # bf16; for GPUs from compute capability 8.9 on, on a CPU a slow simulation. bf16 and fp8 are for engine torch.
    precision: Literal["auto", "fp16", "bf16", "fp8", "fp32"] = "auto"
    # Patches in one forward pass; of frames as many as have that many patches. None: 512 on a CPU, where what a pass
    # touches should stay in the cache; on CUDA what fills the chip, by CLIP's size (engines/pass_size.py).
    batch: int | None = None
    cuda_graph: bool = True  # engine torch on CUDA: record the full pass at the start and replay it; not for score maps
    cache_dir: Path = Path("~/.cache/tgmae")  # caption embeddings, ONNX graphs, TensorRT plans

    def precision_on(self, device_type: str) -> Literal["fp16", "bf16", "fp8", "fp32"]:
        """What `precision` means on "cuda" or "cpu"."""
        if self.precision == "auto":
            return "fp16" if device_type == "cuda" else "fp32"
        return self.precision

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"clip.batch must be at least 1, got {self.batch}")
        if self.precision in ("bf16", "fp8") and self.engine != "torch":
            raise ValueError(
                f"clip.precision {self.precision} runs on clip.engine torch only, got {self.engine}: take "
                "--clip.engine torch, or --clip.precision fp16"
            )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A student's size and training."""

    pipeline: Literal["dali", "pyav"] = "dali"
    hidden: int = 1024  # width of the network's two hidden layers
    rounds: int = 600  # batches of clips that are shown to the student
    clips: int = 16  # in a round
    batch: int = 512  # patches in a training step
    learning_rate: float = 1e-3
    check_clips: int = 64  # of the other split, or of the same one where there is none, for the measured agreement

    def __post_init__(self) -> None:
        for name in ("hidden", "rounds", "clips", "batch", "check_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay. All rates are for batch 256 and scale with batch / 256."""

    base_lr: float = 1.5e-4
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    warmup_epochs: float = 40
    weight_decay: float = 0.05  # on matrices only: not on biases, norms and the mask token
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = None  # largest gradient norm; None leaves gradients alone

    def __post_init__(self) -> None:
        for name in ("base_lr", "warmup_lr", "min_lr", "warmup_epochs", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must lie in [0, 1), got {self.betas}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optim.clip_norm must be above 0, or None for no clipping, got {self.clip_norm}")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How often what is written to the run folder, in optimiser steps."""

    metrics_every: int = 10
    picture_every: int = 500  # originals, masks and reconstructions
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    tensorboard: bool = True
    progress: bool = True  # the progress bar

    def __post_init__(self) -> None:
        for name in ("metrics_every", "picture_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"log.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What decides a batch: clips, scores and masks."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    seed: int = 0  # of order, crops and masks; in training of weights too
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)

    def __post_init__(self) -> None:
        if self.mask.kind == "tgm" and self.mask.frames_per_tubelet > self.model.tubelet_size:
            raise ValueError(
                f"mask.frames_per_tubelet must be at most model.tubelet_size, got {self.mask.frames_per_tubelet} "
                f"and {self.model.tubelet_size}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        num_patches = self.model.patches_per_slot
        num_masked = self.mask.masked_per_slot(num_patches)
        if not 0 < num_masked < num_patches:
            raise ValueError(
                f"mask.ratio {self.mask.ratio} masks {num_masked} of the {num_patches} patches of a slot "
                f"(image {self.model.image_size}, patch {self.model.patch_size}); "
                "at least one must be masked and one visible"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(InputConfig):
    """One pretraining run."""

    pipeline: Literal["dali", "pyav"] = "dali"  # pyav is the readable reference
    run_dir: Path = Path("runs/demo")  # everything the run writes
    resume: str = "auto"  # auto: from run_dir's newest checkpoint if any; never; or a checkpoint file
    init_from: Path | None = None  # start from these weights: a folder in Hugging Face's VideoMAE format
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast on CUDA, float32 on a CPU
    epochs: int = 800  # passes over the videos; each gives data.repeat clips a pass
    max_steps: int | None = None  # stop after so many optimiser steps; the schedule still spans `epochs`
    batch_size: int = 2048  # clips an optimiser step, over all processes
    device_batch_size: int = 64  # clips a forward pass on one process; the rest is gradient accumulation
    compile: bool = False  # torch.compile the transformer blocks: minutes at the start, needs a C++ compiler
    cuda_graph: bool = False  # launch forward and backward as one CUDA graph; one process on one GPU
    profile: int = 0  # steps to profile, after ten of warm-up, into run_dir/profile; docs/profiling.md
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "device_batch_size", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.profile < 0:
            raise ValueError(f"profile must not be negative, got {self.profile}")
        if self.device_batch_size % self.data.repeat:
            raise ValueError(
                f"device_batch_size must be a multiple of data.repeat, got {self.device_batch_size} "
                f"and {self.data.repeat}"
            )

    def accumulation_steps(self, world_size: int) -> int:
        """Forward passes of each process in one optimiser step."""
        per_pass = self.device_batch_size * world_size
        if self.batch_size % per_pass:
            raise ValueError(
                f"batch_size must be a multiple of device_batch_size × processes, "
                f"got {self.batch_size} and {self.device_batch_size} × {world_size}; set both"
            )
        return self.batch_size // per_pass


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON types."""
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    assert isinstance(plain, dict)
    return plain
