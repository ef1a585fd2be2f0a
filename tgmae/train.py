"""The training loop, from top to bottom: set up → (load → forward → backward → update → report → save)* → export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dali_pipelines.types import ClipRequest
from tgmae.config.run import TrainConfig
from tgmae.model.huggingface import export_hf
from tgmae.telemetry.nvtx_ranges import named_range
from tgmae.training.loader import InputError, TrainingBatch
from tgmae.training.process import manual_garbage_collection, stop_requests
from tgmae.training.run_log import describe_skipped
from tgmae.training.setup import Run, Steps, set_up


@dataclass(frozen=True)
class TrainResult:
    step: int  # optimiser steps done
    total_steps: int
    loss: float  # mean over the steps of the last report; NaN where no step was taken
    run_dir: Path


def train(config: TrainConfig) -> TrainResult:
    """Pretrain as `config` says, from the newest checkpoint if there is one, and leave everything in its run folder.

    Raises ValueError, FileNotFoundError or OSError, which say what to do about it. Checkpoints stay whole whatever
    happens.
    """
    run = set_up(config)
    if isinstance(run, Steps):  # all of them are done
        return TrainResult(run.first, run.total, math.nan, config.run_dir)
    world, loader, log, steps = run.world, run.loader, run.log, run.steps
    step, skipped = steps.first, set[int]()  # manifest rows that could not be read, over all processes
    try:
        with stop_requests() as stop, manual_garbage_collection():
            while step < steps.last:
                # Add up the gradients of every forward pass. The loader has made the batch while the last step ran.
                losses: list[Tensor] = []
                requests: list[ClipRequest] = []
                for micro in range(steps.accumulation):
                    with named_range("wait"):
                        batch = loader.next_batch()
                    loss, prediction = run.step.add_gradients(
                        batch.clips.frames, batch.masks, is_last=micro == steps.accumulation - 1
                    )
                    losses.append(loss)
                    requests.extend(batch.clips.requests)

                # Update the weights. Losses stay on the device and are read a step later, so that nothing waits here.
                rate = run.schedule.rate(step)
                grad_norm = run.step.update(rate)
                step += 1
                run.profiler.step()
                log.record(step, losses, grad_norm, requests)

                # Processes agree on what to do next: a signal or a broken video concerns all of them.
                found_skipped, stopping = world.any(not skipped.issuperset(loader.skipped), stop.requested)
                if found_skipped:
                    skipped = world.union(set(loader.skipped))

                # Report, draw and save, each at its own interval.
                if step % config.log.metrics_every == 0 or step == steps.last or stopping:
                    log.report(step, rate, len(skipped), loader, run.step)
                if world.is_main and (step % config.log.picture_every == 0 or step == steps.last):
                    _draw(config, batch, prediction, step)
                if step % config.log.checkpoint_every == 0:
                    run.save(step)

                # Stop early for too many broken videos, or when asked to.
                if len(skipped) > max(1, config.data.max_skipped * len(run.manifest)):
                    run.save(step)
                    raise ValueError(describe_skipped(len(skipped), loader, config, run.manifest))
                if stopping:
                    world.say(f"\nstopped by {stop.name} after step {step}; the same command resumes from there")
                    break
            run.save(step)
    except InputError:  # no further batch: keep what was learned
        run.save(step)
        raise
    finally:
        run.close()
    _finish(config, run, step, len(skipped))
    return TrainResult(step, steps.total, log.loss, config.run_dir)


def _finish(config: TrainConfig, run: Run, step: int, num_skipped: int) -> None:
    """Draw the loss curve, export the weights, and sum up."""
    world = run.world
    if world.is_main:
        from tgmae.pictures.loss_curve import draw_loss  # and matplotlib, which the first step need not wait for

        draw_loss(config.run_dir)
        export_hf(run.model, config.run_dir / "hf")
    world.wait()
    world.close()
    if run.profiler.note:
        world.say(run.profiler.note)
    world.say(run.log.summarise(step, run.steps.total, num_skipped, run.loader))


def _draw(config: TrainConfig, batch: TrainingBatch, prediction: Tensor, step: int) -> None:
    """Draw originals, masks and reconstructions of the first clips of a batch."""
    from tgmae.pictures.reconstructions import draw_reconstructions

    clips = zip(batch.clips.videos[:3], batch.clips.captions()[:3], strict=True)
    order = f", {config.mask.order}" if config.mask.kind == "tgm" else ""
    draw_reconstructions(
        config.run_dir / "pictures" / f"step_{step:08d}.png",
        config.model,
        batch.clips.frames,
        batch.masks,
        prediction,
        [caption or video.label or video.name for video, caption in clips],
        f"step {step}, {config.mask.kind} mask{order}, ratio {config.mask.ratio}",
    )
