"""The cost of one clip, stage by stage, counted from shapes and from the videos of a manifest. Nothing is timed.

Bytes are what must move between a stage and memory if each input is read once and each output written once.
Floating-point operations are those of matrix products; a multiply-add counts as two. In stages without products they
are counted by hand, per value, for the picture only: all of these stages are far below the arithmetic limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import mean
from typing import Literal

import torch

from bench.costs.step_flops import count_step_gflop
from bench.costs.traffic import count_traffic
from bench.workloads.inputs import make_random_clip
from bench.workloads.kernel_operations import Size
from bench.workloads.window import Window
from engines.patch_similarity import make_tower
from engines.towers.clip_towers import StudentTower
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import TrainConfig
from tgmae.config.training import DistillConfig
from tgmae.data.manifest import Manifest
from tgmae.data.sampling import ClipSampler
from tgmae.masks.agreement import count_gflop as count_scorer_gflop
from tgmae.model.videomae import VideoMAE

Resource = Literal["NVDEC", "PCIe", "SMs"]
Unit = Literal["tensor cores", "float32"]
SCORERS = ("cached", "student", "dense", "patch")
STEP = ("top-k", "gather", "matrix products", "other operators", "loss", "loss, backward", "optimiser")

# AdamW's bytes per parameter, all in float32. The gradient norm reads the gradients (4). Clipping scales them, even
# by 1, and so reads and writes them (8). The fused step reads parameter, gradient and both moments (16) and writes all
# but the gradient (12).
OPTIMISER_BYTES = 4 + 8 + 16 + 12
# Operations per value, counted by hand in the kernels' code, AdamW's formulas, and a resize with two taps an axis.
_BY_HAND = {
    "top-k": 64,
    "gather": 2,
    "loss": 8,
    "loss, backward": 4,
    "optimiser": 17,
    "to RGB": 5,
    "crop and resize": 8,
}
_YUV = 1.5  # bytes per pixel in 4:2:0, which decoders write


@dataclass(frozen=True)
class Stage:
    """Work of one stage for one clip.

    moved      bytes between the stage and the GPU's memory, or over PCIe
    operations floating-point operations, on `unit`
    pixels     number that NVDEC must decode
    """

    name: str
    resource: Resource
    moved: float
    operations: float = 0.0
    unit: Unit = "float32"
    pixels: float = 0.0


@dataclass(frozen=True)
class Footage:
    """Work that clips ask of a decoder: means over the clips that training would draw, one from each video."""

    clips: int
    codecs: frozenset[str]
    file_bytes: float
    frames_passed: float  # that a decoder goes through, from the keyframe before the window to its end
    pixels_passed: float  # frames × pixels
    pixels: float  # of a frame
    crop_pixels: float


def survey(manifest: Manifest, config: TrainConfig) -> Footage:
    """Draw a clip from each video of a manifest and average what they ask of a decoder."""
    data = replace(config.data, split="", repeat=1)
    sampler = ClipSampler(
        manifest=manifest, data=data, num_frames=config.model.num_frames, batch_size=len(manifest), seed=config.seed
    )
    requests = sampler(0)
    windows = [Window(manifest.file(r.row), manifest[r.row], r.frames) for r in requests]
    sizes = [window.video.width * window.video.height for window in windows]
    return Footage(
        clips=len(windows),
        codecs=frozenset(window.video.codec for window in windows),
        file_bytes=mean(window.video.num_bytes for window in windows),
        frames_passed=mean(window.frames_passed for window in windows),
        pixels_passed=mean(w.frames_passed * size for w, size in zip(windows, sizes, strict=True)),
        pixels=mean(sizes),
        crop_pixels=mean(request.crop.width * request.crop.height for request in requests),
    )


def clip_bytes(model: ModelConfig) -> int:
    """Return the bytes of a clip's uint8 frames as training sees them."""
    return model.num_frames * model.image_size**2 * 3


def loading_stages(footage: Footage, model: ModelConfig) -> list[Stage]:
    """Return the stages from a file's bytes in host memory to frames on the GPU, decoded by NVDEC.

    The decoder writes 4:2:0 for every frame it goes through; RGB is written for the clip's own frames only.
    """
    frames, clip = model.num_frames, clip_bytes(model)
    decoded = frames * footage.pixels
    return [
        Stage("file to the GPU", "PCIe", footage.file_bytes),  # an upper bound: DALI gets an excerpt
        Stage("decode", "NVDEC", _YUV * footage.pixels_passed, pixels=footage.pixels_passed),
        Stage("to RGB", "SMs", (_YUV + 3) * decoded, _BY_HAND["to RGB"] * 3 * decoded),
        Stage("crop and resize", "SMs", frames * 3 * footage.crop_pixels + clip, _BY_HAND["crop and resize"] * clip),
    ]


def step_stages(config: TrainConfig, ratio: float, batch: int) -> list[Stage]:
    """Return the stages of top-k and of a training step in bfloat16, where a step takes `batch` clips."""
    model = config.model
    size = Size("", model, batch, ratio, torch.bfloat16)
    values, masked = model.values_per_token, size.num_masked
    visible = model.num_tokens - masked
    traffic = count_traffic(model, ratio, batch)
    parameters = count_parameters(model)

    def kernel(name: str, operation: str, count: float) -> Stage:
        return Stage(name, "SMs", size.bytes_moved(operation) / batch, _BY_HAND[name] * count)

    return [
        kernel("top-k", "topk_mask", model.num_tokens),
        kernel("gather", "gather_tokens", visible * values),
        Stage("matrix products", "SMs", traffic.products, 1e9 * count_step_gflop(model, ratio), "tensor cores"),
        Stage("other operators", "SMs", traffic.others, traffic.values),
        kernel("loss", "masked_mse forward", masked * values),
        kernel("loss, backward", "masked_mse backward", masked * values),
        Stage("optimiser", "SMs", OPTIMISER_BYTES * parameters / batch, _BY_HAND["optimiser"] * parameters / batch),
    ]


@cache
def count_parameters(model: ModelConfig) -> int:
    """Count the network's parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VideoMAE(model).parameters())


@cache
def scorer_stages(model: ModelConfig, batch: int, frames_per_tubelet: Literal[1, 2]) -> dict[str, Stage]:
    """Return the stage of each scorer of text-guided masks, with CLIP ViT-B/32 in half precision.

    Bytes are a lower bound: the frames, the weights once a batch, the scores.
    """
    clip, distill = make_random_clip(), DistillConfig()
    scores = 4 * model.num_tokens
    frames = clip_bytes(model) * frames_per_tubelet / model.tubelet_size
    stages = {"cached": Stage("scores, cached", "PCIe", scores)}  # read and cropped on the host
    values, embed = 3 * model.patch_size**2, clip.visual.proj.shape[1]
    student = StudentTower(model.patch_size, distill.hidden, embed)
    patches = model.num_slots * frames_per_tubelet * model.patches_per_slot
    products = 2 * patches * (values * distill.hidden + distill.hidden**2 + distill.hidden * embed)
    stages["student"] = _scorer("student", frames + scores, _weights([student]) / batch, products)
    for name in ("dense", "patch"):
        mask = MaskConfig(scorer=name, frames_per_tubelet=frames_per_tubelet)
        tower = make_tower(clip, mask.tower(), model.patch_size, model.image_size, model.image_size)
        gflop = count_scorer_gflop(clip, model, mask)
        stages[name] = _scorer(name, frames + scores, _weights([tower]) / batch, 1e9 * gflop)
    return stages


def _scorer(name: str, clip: float, weights: float, products: float) -> Stage:
    return Stage(f"scores, {name}", "SMs", clip + weights, products, "tensor cores")


def _weights(modules: Sequence[torch.nn.Module]) -> int:
    """Return the bytes of all parameters in half precision."""
    return sum(2 * x.numel() for module in modules for x in module.parameters())
