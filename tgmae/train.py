"""The training loop, from top to bottom: set up → (load → forward → backward → update → report → save)* → export."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dali_pipelines.types import ClipRequest
from tgmae.config.run import TrainConfig
from tgmae.model.huggingface import export_hf, read_step
from tgmae.model.pretraining import Losses
from tgmae.model.videomae import VideoMAE
from tgmae.telemetry.watch import Phase
from tgmae.training import parallel
from tgmae.training.loader import InputError, InputStalled, TrainingBatch
from tgmae.training.parallel import World
from tgmae.training.process import StopRequest, manual_garbage_collection, stop_requests
from tgmae.training.run_folder import hold_run_folder
from tgmae.training.run_log import describe_skipped
from tgmae.training.setup import Finished, Run, set_up
from tgmae.training.sharding import gather_weights


@dataclass(frozen=True)
class TrainResult:
    step: int  # optimiser steps done
    total_steps: int
    loss: float  # mean over the steps of the last report; NaN where no step was taken
    run_dir: Path
    signal: int = 0  # number of the signal that asked to stop, in any process of the run; 0 for none


def train(config: TrainConfig) -> TrainResult:
    """Pretrain as `config` says, from the newest checkpoint if there is one, and leave everything in its run folder.

    Raises ValueError, FileNotFoundError or OSError, which say what to do about it. Checkpoints stay whole whatever
    happens.
    """
    with parallel.join(config.device) as world:
        return _train(config, world)


def _train(config: TrainConfig, world: World) -> TrainResult:
    with hold_run_folder(config.run_dir, world):
        run = set_up(config, world)
        if isinstance(run, Finished):
            _complete(config, run, world)
            return TrainResult(run.steps.first, run.steps.total, math.nan, config.run_dir)
        with stop_requests() as stop:
            step, num_skipped, stopped_by = _take_steps(config, run, stop)
            _finish(config, run, step, num_skipped)
    return TrainResult(step, run.steps.total, run.log.loss, config.run_dir, stopped_by or stop.number)


def _take_steps(config: TrainConfig, run: Run, stop: StopRequest) -> tuple[int, int, int]:
    """Train until all steps are done or a process is asked to stop.

    Returns the steps done, the number of skipped videos, and the signal that asked, 0 for none.
    """
    world, loader, log, steps = run.world, run.loader, run.log, run.steps
    step, stopping, skipped = steps.first, 0, set[int]()  # manifest rows that could not be read, over all processes
    try:
        with world.noticing_losses(), manual_garbage_collection():
            while step < steps.last:
                # Add up the gradients of every forward pass. The loader has made the batch while the last step ran.
                losses: list[Losses] = []
                requests: list[ClipRequest] = []
                for micro in range(steps.accumulation):
                    world.note(Phase.INPUT, step, micro)
                    batch = loader.next_batch(lambda: stop.requested)
                    world.note(Phase.STEP, step, micro)
                    done, prediction = run.step.add_gradients(batch.inputs, is_last=micro == steps.accumulation - 1)
                    losses += done
                    requests.extend(batch.clips.requests)

                # Update the weights. Losses stay on the device and are read a step later, so that nothing waits here.
                rate = run.schedule.rate(step)
                grad_norms = run.step.update(rate)
                step += 1
                run.profiler.step()
                log.record(step, losses, grad_norms, requests)

                world.note(Phase.REPORT, step)
                # Processes agree on what to do next: a signal or a broken video concerns all of them.
                found_skipped, stopping = world.max(not skipped.issuperset(loader.skipped), stop.number)
                if found_skipped:
                    skipped = world.union(set(loader.skipped))

                # Validate, report, draw and save, each at its own interval.
                if run.validation.is_due(step) and not stopping:
                    run.validate(step, lambda: stop.requested)
                if step % config.log.metrics_every == 0 or step == steps.last or stopping:
                    log.report(step, rate, skipped, loader, run.step)
                log.sum_up_epochs(step, loader)
                is_shown = step == 1 or step % config.log.picture_every == 0 or step == steps.last
                if world.is_main and is_shown and prediction is not None:
                    log.show(step, _draw(config, batch, prediction, step))
                if step % config.log.checkpoint_every == 0:
                    run.save(step)

                # Stop early for too many broken videos, or when asked to.
                if (broken := log.sets.find_broken(skipped, config.data.max_skipped)) is not None:
                    run.save(step, wait=True)
                    raise ValueError(describe_skipped(broken, skipped, loader, config))
                if stopping:
                    name = signal.Signals(stopping).name
                    world.say(f"stopped by {name} after step {step}; the same command resumes from there")
                    break
            world.note(Phase.END, step)
            run.save(step, wait=True)
    except InputStalled:
        place = "there" if run.save_alone(step) else "the last checkpoint"
        stopping = stop.number
        name = signal.Signals(stopping).name
        world.say(f"stopped by {name} after step {step}, as no input came; the same command resumes from {place}")
    except (InputError, OSError):  # no further batch, a full disk, or a lost process: keep what was learned
        world.note(Phase.END, step)
        run.save_alone(step)
        raise
    finally:
        run.close()
    return step, len(skipped), stopping


def _finish(config: TrainConfig, run: Run, step: int, num_skipped: int) -> None:
    """Draw the loss curve, export the weights, and sum up."""
    world, mae = run.world, run.model.mae
    weights = gather_weights(mae.state_dict(), world)
    if world.is_main:
        _write_results(config.run_dir, mae, weights, step)
    world.wait()
    if run.profiler.note:
        world.say(run.profiler.note)
    world.say(run.log.summarise(step, run.steps.total, num_skipped, run.loader))


def _complete(config: TrainConfig, run: Finished, world: World) -> None:
    """Write the results of a run that ended before it could, as one that was killed has."""
    step, is_whole = run.steps.first, (config.run_dir / "loss.png").exists()
    is_due = config.resume == "auto" and (read_step(config.run_dir / "hf") != step or not is_whole)
    if not any(world.max(world.is_main and is_due)):
        return
    weights = gather_weights(run.model.state_dict(), world)
    if world.is_main:
        _write_results(config.run_dir, run.model, weights, step)
        print(f"the results of step {step} were missing: wrote {config.run_dir}/hf and loss.png", flush=True)


def _write_results(run_dir: Path, model: VideoMAE, weights: dict[str, Tensor], step: int) -> None:
    from tgmae.pictures.loss_curve import draw_loss  # and matplotlib, which the first step need not wait for

    try:
        draw_loss(run_dir)
    finally:  # the weights even if there is no room for the picture
        export_hf(model, run_dir / "hf", step, weights)


def _draw(config: TrainConfig, batch: TrainingBatch, prediction: Tensor, step: int) -> Path:
    """Draw originals, masks, predictions and reconstructions of the first clips of a batch, and return the PNG."""
    from tgmae.pictures.reconstructions import draw_reconstructions

    path = config.run_dir / "pictures" / f"step_{step:08d}.png"
    order = f", {config.mask.order}" if config.mask.kind == "tgm" else ""
    draw_reconstructions(
        path, config.model, batch.clips, batch.masks, prediction,
        f"step {step}, {config.mask.kind} mask{order}, ratio {config.mask.ratio}",
    )  # fmt: skip
    return path
