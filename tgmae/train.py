"""The training loop, from top to bottom: set up → (load → forward → backward → step → log → save)* → report."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dali_pipelines.types import ClipRequest
from tgmae.captions.policy import require_captions
from tgmae.config import TrainConfig, to_dict
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.scorer import make_scorer
from tgmae.model.attention import choose_attention
from tgmae.model.huggingface import export_hf, import_hf
from tgmae.model.videomae import VideoMAE
from tgmae.pictures.loss_curve import draw_loss
from tgmae.pictures.reconstructions import draw_reconstructions
from tgmae.telemetry.metrics import MetricsWriter, Throughput
from tgmae.telemetry.nvtx_ranges import named_range
from tgmae.telemetry.profiler import StepProfiler
from tgmae.training import parallel as distributed
from tgmae.training.async_losses import AsyncLosses
from tgmae.training.checkpoint import (
    changed_settings,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    restore,
    save_checkpoint,
    set_aside_newer,
    set_aside_run,
)
from tgmae.training.loader import TrainingBatch, make_loader
from tgmae.training.optim import Schedule, make_optimizer
from tgmae.training.process import manual_garbage_collection, stop_requests
from tgmae.training.run_log import advise_scorer, describe_bad_loss, describe_run, describe_skipped
from tgmae.training.step import TrainingStep


@dataclass(frozen=True)
class TrainResult:
    step: int  # optimiser steps done
    total_steps: int
    loss: float  # mean over the steps of the last report; NaN where no step was taken
    run_dir: Path


def train(config: TrainConfig) -> TrainResult:
    """Pretrain as `config` says, from the newest checkpoint where there is one, and leave everything in its run folder.

    Raises ValueError, FileNotFoundError or OSError with what to do about it; checkpoints stay whole whatever happens.
    """
    # ---- set up -------------------------------------------------------------------------------------------------
    world = distributed.start(config.device)
    say = print if world.is_main else _say_nothing
    manifest = read_manifest(config.data.manifest).select_split(config.data.split)
    notes = []
    if config.mask.kind == "tgm":
        manifest, note = require_captions(manifest, config.mask.no_caption)
        notes.append(note)
    scorer = make_scorer(config, manifest, world.device)
    notes += [scorer.note, advise_scorer(config)]
    accumulation = config.accumulation_steps(world.size)
    steps_per_epoch = len(manifest) * config.data.repeat / config.batch_size
    total_steps = math.ceil(config.epochs * steps_per_epoch)
    last_step = min(total_steps, config.max_steps or total_steps)

    torch.manual_seed(config.seed)
    attention = choose_attention(config.model.attention, world.device)
    model = VideoMAE(config.model, attention)
    if config.init_from is not None:
        import_hf(model, config.init_from)
    model.to(world.device)
    optimizer = make_optimizer(model, config.optim)
    schedule = Schedule(
        config=config.optim, batch_size=config.batch_size, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    checkpoints = config.run_dir / "checkpoints"
    start, resume_notes = _resume(config, checkpoints, model, optimizer, manifest.fingerprint)
    notes += resume_notes
    use_bf16 = config.precision == "bf16" or (config.precision == "auto" and world.device.type == "cuda")
    say(describe_run(config, world, manifest, model, attention, use_bf16, f"{start} to {last_step} of {total_steps}"))
    for note in filter(None, notes):
        say(note)
    if start >= last_step:
        say(f"nothing to do: step {start} of {last_step} is done. Train afresh with --resume never")
        world.close()
        return TrainResult(start, total_steps, math.nan, config.run_dir)
    training_step = TrainingStep(model, optimizer, config, world, use_bf16)
    world.wait()  # every process has read its checkpoint
    if world.is_main:
        if config.resume == "never" and (old := set_aside_run(config.run_dir)):
            say(f"set aside the run that was in {config.run_dir}: {old}")
        for path in set_aside_newer(checkpoints, start):
            say(f"set aside {path}: this run starts from step {start}")
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")

    metrics = MetricsWriter(config.run_dir, start, config.log.tensorboard) if world.is_main else None
    loader = make_loader(config, manifest, scorer, start * accumulation, world.device, world.rank, world.size)
    bar = tqdm(total=last_step, initial=start, unit="step", disable=not (world.is_main and config.log.progress))
    window = Throughput()
    profiler = StepProfiler(config.run_dir / "profile", config.profile if world.is_main else 0, world.device)
    readback, loss_mean, grad_norm, step, saved_step = AsyncLosses(world.device), math.nan, math.nan, start, start
    skipped: set[int] = set()  # manifest rows that could not be read, over all processes

    def read_losses(wait: bool) -> None:
        nonlocal grad_norm
        for seen in readback.pop(wait):
            if not seen.is_finite:
                raise ValueError(describe_bad_loss(seen, manifest, checkpoints))
            window.count(config.batch_size, sum(seen.losses) / accumulation)
            grad_norm = seen.grad_norm

    def save() -> None:
        nonlocal saved_step
        read_losses(wait=True)
        if world.is_main and step > saved_step:
            save_checkpoint(checkpoints, step, model, optimizer, config, manifest.fingerprint)
            prune_checkpoints(checkpoints, config.log.keep_checkpoints)
        saved_step = step
        gc.collect()

    # ---- the loop -----------------------------------------------------------------------------------------------
    try:
        with stop_requests() as stop, manual_garbage_collection():
            while step < last_step:
                losses: list[torch.Tensor] = []
                requests: list[ClipRequest] = []
                for micro in range(accumulation):
                    try:
                        with named_range("wait"):
                            batch = loader.next_batch()
                    except ValueError:  # nothing left to decode: keep what was learned
                        save()
                        raise
                    loss, prediction = training_step.add_gradients(
                        batch.clips.frames, batch.masks, is_last=micro == accumulation - 1
                    )
                    losses.append(loss)
                    requests.extend(batch.clips.requests)
                rate = schedule.rate(step)
                norm = training_step.update(rate)
                step += 1
                profiler.step()
                bar.update()
                readback.push(step, losses, norm, requests)
                read_losses(wait=False)

                found_skipped, stopping = world.any(not skipped.issuperset(loader.skipped), stop.requested)
                if found_skipped:
                    skipped = world.union(set(loader.skipped))
                if step % config.log.metrics_every == 0 or step == last_step or stopping:
                    read_losses(wait=True)
                    report = {
                        "epoch": step / steps_per_epoch,
                        **window.report(loader.waited_s, loader.clock.totals() | training_step.clock.totals()),
                        "learning_rate": rate,
                        "grad_norm": grad_norm,
                        "skipped_videos": len(skipped),
                    }
                    report["loss"] = loss_mean = world.mean(report["loss"])
                    gc.collect(1)  # what was made since the last report
                    if metrics is not None:
                        metrics.write(step, report)
                    bar.set_postfix_str(
                        f"loss {report['loss']:.3f}, {report['clips_per_s']:.1f} clips/s, "
                        f"waiting {report['wait_share']:.0%}"
                    )
                if world.is_main and (step % config.log.picture_every == 0 or step == last_step):
                    _draw(config, manifest, batch, prediction, step)
                if step % config.log.checkpoint_every == 0:
                    save()
                if len(skipped) > max(1, config.data.max_skipped * len(manifest)):
                    save()
                    raise ValueError(describe_skipped(len(skipped), loader, config, manifest))
                if stopping:
                    say(f"\nstopped by {stop.name} after step {step}; go on with the same command")
                    break
            save()
    finally:
        bar.close()
        loader.close()
        profiler.close()
        if metrics is not None:
            metrics.close()

    # ---- report -------------------------------------------------------------------------------------------------
    if world.is_main:
        draw_loss(config.run_dir)
        export_hf(model, config.run_dir / "hf")
    world.wait()
    world.close()
    if profiler.note:
        say(profiler.note)
    say(
        f"step {step} of {total_steps}, loss {loss_mean:.3f}; {window.summary(loader.waited_s)}, "
        f"{len(skipped)} videos skipped; see {config.run_dir}"
    )
    return TrainResult(step, total_steps, loss_mean, config.run_dir)


def _resume(
    config: TrainConfig, checkpoints: Path, model: VideoMAE, optimizer: torch.optim.Optimizer, videos: str
) -> tuple[int, list[str]]:
    """Load the checkpoint that `config.resume` names, if any; return the steps done and what the user should know."""
    if config.resume == "never":
        return 0, []
    path = newest_checkpoint(checkpoints) if config.resume == "auto" else Path(config.resume)
    if path is None:
        return 0, []
    state = load_checkpoint(path)
    start = restore(state, path, model, optimizer, config, videos)
    notes = [f"going on from {path}" + (f"; --init-from {config.init_from} is not used" if config.init_from else "")]
    if changed := changed_settings(state, config):
        notes.append(f"changed since that checkpoint: {', '.join(changed)}")
    return start, notes


def _draw(config: TrainConfig, manifest: Manifest, batch: TrainingBatch, prediction: torch.Tensor, step: int) -> None:
    names = []
    for request in batch.clips.requests[:3]:
        video = manifest[request.row]
        names.append(video.captions[request.caption] if video.captions else video.label or video.path)
    order = f", {config.mask.order}" if config.mask.kind == "tgm" else ""
    draw_reconstructions(
        config.run_dir / "pictures" / f"step_{step:08d}.png",
        config.model,
        batch.clips.frames,
        batch.masks,
        prediction,
        names,
        f"step {step}, {config.mask.kind} mask{order}, ratio {config.mask.ratio}",
    )


def _say_nothing(*_: object, **__: object) -> None:
    """What the other processes print."""
