"""What a training run says: the choices it was made with, and what to do where it stops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from dali_pipelines.placement import Placement, choose_placement
from dali_pipelines.video.excerpt import why_no_excerpt
from tgmae.config import TrainConfig
from tgmae.data.manifest import Manifest
from tgmae.data.sampling import clip_span
from tgmae.masks.config import MOTION_KINDS
from tgmae.model.config import ModelConfig
from tgmae.model.videomae import VideoMAE
from tgmae.training.async_losses import StepRecord
from tgmae.training.checkpoint import newest_checkpoint
from tgmae.training.loader import Loader
from tgmae.training.parallel import World

_TRIED = 16  # videos


def describe_run(
    config: TrainConfig,
    world: World,
    manifest: Manifest,
    model: VideoMAE,
    attention: str,
    use_bf16: bool,
    steps: str,
) -> str:
    """The choices this run was made with, those behind `auto` too."""
    data, shape = config.data, config.model
    visible = shape.patches_per_slot - config.mask.masked_per_slot(shape.patches_per_slot)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    network = [f"{millions:.1f} M parameters", f"attention {attention}", "bf16 autocast" if use_bf16 else "float32"]
    if config.compile:
        network.append("compiled blocks (the first step waits for them)")
    if config.cuda_graph:
        network.append("CUDA graph")
    accumulation = config.accumulation_steps(world.size)
    return (
        f"data      {len(manifest)} videos from {data.manifest}; "
        f"clips {shape.num_frames}×{shape.image_size}², {data.sampling} sampling, stride {data.stride}\n"
        f"pipeline  {config.pipeline}, {_describe_decoding(config, world, manifest)}\n"
        f"model     {', '.join(network)}\n"
        f"mask      {_describe_mask(config, world.device)}, {visible * shape.num_slots} of {shape.num_tokens} "
        "tokens visible\n"
        f"run       {config.run_dir} on {world.size} × {world.device.type}, steps {steps}; "
        f"batch {config.batch_size}: {accumulation} × {config.device_batch_size} clips on each"
    )


def _describe_decoding(config: TrainConfig, world: World, manifest: Manifest) -> str:
    """Raises ValueError where --data.decode asks for what is not there."""
    if config.pipeline == "pyav":
        return "decoding on the CPU"
    decoding = choose_placement(config.data, world.device)
    span = clip_span(config.data, config.model.num_frames)
    return decoding.describe(manifest.coded()) + _try_excerpts(manifest, decoding, span)


def _try_excerpts(manifest: Manifest, decoding: Placement, span: int) -> str:
    """What NVDEC takes by the manifest may hold packets that it must not get, which only the file says."""
    kinds = decoding.native(manifest.coded())
    native = [row for row, kind in enumerate(manifest.coded()) if kind in kinds] if kinds else []
    tried = native[:: max(1, -(-len(native) // _TRIED))]
    refused = [reason for row in tried if (reason := why_no_excerpt(manifest.file(row), manifest[row], span))]
    if not refused:
        return ""
    reasons = ", ".join(sorted(set(refused)))
    return f"; but {len(refused)} of {len(tried)} tried go to PyAV too ({reasons}): tgmae-data compact mends that"


def _describe_mask(config: TrainConfig, device: torch.device) -> str:
    mask, clip = config.mask, config.clip
    if mask.kind in MOTION_KINDS:
        return f"{mask.kind}, motion from {mask.flow if mask.kind == 'mgmae' and mask.flow else mask.motion}"
    if mask.kind != "tgm":
        return mask.kind
    which = {"dense": f" ({mask.dense})", "cached": f" ({mask.scores})", "student": f" ({mask.student})"}
    words = f"{mask.kind} ({mask.order}), scorer {mask.scorer}{which.get(mask.scorer, '')}, CLIP {clip.model}"
    if mask.scorer == "cached":
        return words
    frames = "both frames" if mask.frames_per_tubelet > 1 else "1 frame"
    return f"{words} in {clip.engine}, {clip.precision_on(device.type)}, {frames} of each tubelet"


def advise_scorer(config: TrainConfig) -> str:
    """What is cheaper than scorer patch with a CLIP of real size; "" for every other choice."""
    mask, clip = config.mask, config.clip.model
    if mask.kind != "tgm" or mask.scorer != "patch" or clip == "shapes":
        return ""
    cost = "sends every patch through CLIP by itself"
    shape = replace(config.model, attention=ModelConfig().attention)
    is_vit_b_32 = clip in ("ViT-B-32", "ViT-B-32-quickgelu")
    if is_vit_b_32 and shape == ModelConfig() and (mask.frames_per_tubelet, mask.ratio) == (2, 0.6):
        cost = "costs 25 TFLOP a clip, the training step half a TFLOP"  # counted: docs/performance.md
    return (
        f"scorer patch {cost}: score maps (tgmae-data scores) or a student (tgmae-engine distill), made once, are far "
        "cheaper"
    )


def describe_bad_loss(seen: StepRecord, manifest: Manifest, checkpoints: Path) -> str:
    """Names the clips of the forward passes that went wrong; of the whole step where only the gradient did."""
    losses, size = seen.losses, len(seen.requests) // len(seen.losses)
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
    clips = [request for number in bad for request in seen.requests[number * size : (number + 1) * size]]
    newest = newest_checkpoint(checkpoints)
    return (
        f"loss is {sum(losses) / len(losses)} and the gradient's norm {seen.grad_norm} at step {seen.step}; the "
        f"weights were not updated with it. {f'Newest checkpoint: {newest}. ' if newest else ''}The clips:\n"
        + "\n".join(f"  {request}  {manifest[request.row].path}" for request in clips)
    )


def describe_skipped(count: int, loader: Loader, config: TrainConfig, manifest: Manifest) -> str:
    return (
        f"{count} of {len(manifest)} videos could not be read ({count / len(manifest):.1%}, more than "
        f"--data.max-skipped {config.data.max_skipped:.1%}). Raise that share, or index the folder anew with "
        "--decode-all. The first:\n"
        + "\n".join(f"  {video.path}: {video.reason}" for video in list(loader.skipped.values())[:5])
    )
