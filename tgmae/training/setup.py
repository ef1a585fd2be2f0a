"""Set up a run: everything that happens before the loop.

`set_up` prepares pretraining. Its parts (processes, steps, resuming, run folder) are shared with finetuning.
"""

from __future__ import annotations

import gc
import math
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from tgmae.captions.policy import require_captions
from tgmae.config.masks import MOTION_KINDS
from tgmae.config.paths import describe_paths
from tgmae.config.run import TrainConfig
from tgmae.config.saved import write_config
from tgmae.data.manifest import Manifest
from tgmae.data.mixing.joined import for_each_set, open_data_sets
from tgmae.masks.choosing import choose_scorer
from tgmae.model.attention import choose_attention
from tgmae.model.contrastive import ContrastiveHead
from tgmae.model.pretraining import Pretraining
from tgmae.model.videomae import VideoMAE
from tgmae.telemetry.profiler import StepProfiler
from tgmae.training.checkpoints.folder import set_aside_newer
from tgmae.training.checkpoints.restore import changed_settings, restore
from tgmae.training.checkpoints.start import Start, find_start, require_same_step
from tgmae.training.checkpoints.write import Checkpoints
from tgmae.training.loader import Loader, open_clips
from tgmae.training.optim import Schedule, make_optimizer
from tgmae.training.parallel import World
from tgmae.training.run_folder import set_aside_run
from tgmae.training.run_log import RunLog, advise_scorer, describe_run
from tgmae.training.sharding import shard, shares_network
from tgmae.training.step import TrainingStep
from tgmae.training.validation.held_out import bind_with_held_out
from tgmae.training.validation.loss import Validation


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Optimiser steps: `first` are done, the run goes up to `last`, and the schedule spans `total`."""

    first: int
    last: int
    total: int
    per_epoch: float
    accumulation: int  # forward passes of each process per step


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the loop works with. Call `close` at its end."""

    world: World
    manifest: Manifest
    model: Pretraining
    step: TrainingStep
    schedule: Schedule
    steps: Steps
    loader: Loader
    validation: Validation
    log: RunLog
    checkpoints: Checkpoints
    profiler: StepProfiler

    def save(self, step: int, wait: bool = False) -> None:
        """Begin to write a checkpoint of the weights after `step`; with `wait`, see it written.

        Every process must call it. Raises ValueError where the loss was not finite, and OSError where this checkpoint
        or the one before could not be written.
        """
        self.log.settle()
        try:
            self.log.sync()  # reports are never older than the checkpoint
        finally:
            self.checkpoints.save(step)
            if wait:
                self.checkpoints.wait()
        gc.collect()

    def save_alone(self, step: int) -> bool:
        """Save while other processes may be elsewhere, and return whether: not where all of them share the network."""
        if not self.checkpoints.takes_all:
            self.save(step, wait=True)
        return not self.checkpoints.takes_all

    def validate(self, step: int, is_stopping: Callable[[], bool]) -> None:
        """Measure the loss on held-out clips after `step`, and note it. Every process must call it."""
        self.log.settle()  # the GPU is done with the step
        losses, seconds = self.validation.measure(self.loader, is_stopping)
        self.log.note_validation(step, losses, seconds)

    def close(self) -> None:
        """Stop the loader's processes and close the files of the run, all of them even if one fails (OSError)."""
        with ExitStack() as stack:
            for part in (self.checkpoints, self.log, self.profiler, self.loader):
                stack.callback(part.close)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run whose steps are all done, as the checkpoint left it."""

    steps: Steps
    model: VideoMAE


def set_up(config: TrainConfig, world: World) -> Run | Finished:
    """Prepare the run that `config` describes, starting from its newest checkpoint if there is one.

    The run folder must be held (`hold_run_folder`). Raises ValueError, FileNotFoundError or OSError, which say what to
    do about it.
    """
    videos = open_data_sets(config.data)
    manifest = videos.select_split(config.data.split)
    notes: list[str] = []

    # Where to start. A resumed run keeps the epsilon and the scorer that it began with.
    start = find_start(config, world)
    config = _with_norm_eps(config, start.norm_eps)

    # Every video needs a caption where text guides the masks or is contrasted with the clips.
    if config.mask.kind == "tgm" or config.loss.contrasts:
        flags = ["--mask.kind tube --mask.ratio 0.9"] if config.mask.kind == "tgm" else []
        flags += [config.loss.flag_without_contrast] if config.loss.contrasts else []
        require = partial(
            require_captions, no_caption=config.mask.no_caption, chosen=config.captions,
            without_text=f"train without text: {' '.join(flags)}",
        )  # fmt: skip
        manifest, note = for_each_set(manifest, require)
        notes.append(note)
    if config.loss.contrasts:
        _require_contrast(config, world, manifest)
    # From here on it is settled what scores the patches.
    config, note = choose_scorer(config, manifest, start.state["config"]["mask"] if start.state else None)
    _require_same_files(config, world)
    notes.append(note)
    if config.mask.kind in MOTION_KINDS and config.mask.motion and config.mask.no_motion == "exclude":
        from tgmae.masks.motion_field import leave_out_motionless

        manifest, note = for_each_set(manifest, leave_out_motionless)
        notes.append(note)

    # Which steps to take.
    notes += start.notes
    if start.state and (changed := changed_settings(start.state, config)):
        notes.append(f"changed since that checkpoint: {', '.join(changed)}")
    require_same_step(config, world, start.step)
    use_bf16 = config.precision == "bf16" or (config.precision == "auto" and world.device.type == "cuda")
    accumulation = config.accumulation_steps(world.size)
    per_epoch = len(manifest) * config.data.repeat / config.batch_size
    total = math.ceil(config.epochs * per_epoch)
    schedule = Schedule(config=config.optim, batch_size=config.batch_size, total_steps=total, steps_per_epoch=per_epoch)
    notes.append(schedule.note)
    steps = Steps(
        first=start.step, last=min(total, config.max_steps or total), total=total, per_epoch=per_epoch,
        accumulation=accumulation,
    )  # fmt: skip
    if steps.first >= steps.last:
        model, _ = _make_network(config, world, manifest, start, start.text_width, use_bf16)
        for note in filter(None, notes):
            world.say(note)
        more = "--max-steps" if steps.last < total else "--epochs"
        world.say(
            f"nothing to do: step {steps.first} of {steps.last} is done; raise {more}, or use --resume never to "
            "train again"
        )
        return Finished(steps=steps, model=model.mae)

    # The pipeline first: its worker processes take seconds to start, in which CLIP, network and optimiser are made.
    pipeline = open_clips(config, manifest, steps.first * accumulation, world.device, world.rank, world.size)
    try:
        scorer, held_out, held_out_note = bind_with_held_out(config, videos, manifest, world.device)
        (is_missing,) = world.max(held_out is None)
        if held_out is not None and is_missing:
            held_out, held_out_note = None, "no validation: another process cannot use the held-out videos"
        text_width = scorer.text_width if config.loss.contrasts else None
        if start.text_width is not None and text_width is not None and start.text_width != text_width:
            raise ValueError(
                f"cannot resume from {start.path}: its head compares clips with texts of width {start.text_width}, "
                f"--clip.model {config.clip.model} makes them {text_width} wide; use the CLIP it was trained with, or "
                "start over with --resume never"
            )
        model, optimizer = _make_network(config, world, manifest, start, text_width, use_bf16)
        notes += [scorer.note, advise_scorer(config), held_out_note]
        world.say(describe_run(config, world, manifest, pipeline, model.mae, use_bf16, steps.first, steps.last, total))
        if held_out is not None:
            world.say(f"held out  {held_out.describe(config)}")
        for note in filter(None, notes):
            world.say(note)
        step = TrainingStep(model, optimizer, config, world, use_bf16)
        _prepare_folder(config, world, steps.first)
        validation = Validation(config, held_out, world, step, steps.last)
        log = RunLog(config, world, manifest, steps.first, steps.last)
        loader = Loader(pipeline, scorer, config.mask, config.model, world.device)
    except BaseException:
        pipeline.close()
        raise
    checkpoints = Checkpoints(config.run_dir / "checkpoints", config, model, optimizer, manifest.fingerprint, world)
    checkpoints.resume_from(steps.first)
    profiler = StepProfiler(config.run_dir / "profile", config.profile if world.is_main else 0, world.device)
    return Run(
        world=world, manifest=manifest, model=model, step=step, schedule=schedule, steps=steps, loader=loader,
        validation=validation, log=log, checkpoints=checkpoints, profiler=profiler,
    )  # fmt: skip


def _require_same_files(config: TrainConfig, world: World) -> None:
    chosen = zlib.crc32(repr(config.mask).encode())
    if world.max(chosen, -chosen) != (chosen, -chosen):
        raise ValueError(
            f"process {world.rank} of {world.size} would score with {config.mask.scorer}, another one otherwise: all "
            f"of them must find the same files beside "
            f"{describe_paths(config.data.manifest)}; or give --mask.scorer and its file"
        )


def _with_norm_eps(config: TrainConfig, norm_eps: float) -> TrainConfig:
    return replace(config, model=replace(config.model, norm_eps=norm_eps))


def _make_network(
    config: TrainConfig, world: World, manifest: Manifest, start: Start, text_width: int | None, use_bf16: bool
) -> tuple[Pretraining, torch.optim.AdamW]:
    """Make networks and optimiser: as they were at the checkpoint, or with the weights to start from, or fresh.

    text_width   width of the captions' embeddings; None where nothing is contrasted, and no head is made
    """
    torch.manual_seed(config.seed)
    mae, loss = VideoMAE(config.model, choose_attention(config.model.attention, world.device)), config.loss
    if start.weights:
        mae.load_state_dict(start.weights, strict=False)  # what is not among them stays fresh
    head = None
    if text_width is not None:
        head = ContrastiveHead(config.model.width, text_width, loss.temperature, loss.learn_temperature)
    model = Pretraining(mae, head)
    model.freeze_unused(loss)
    model.to(world.device)
    if shares_network(config, world):
        shard(mae, world, use_bf16)
    optimizer = make_optimizer(model, config.optim)
    if start.path is not None:
        restore(start.state, start.path, model, optimizer, config, manifest.fingerprint)
    return model, optimizer


def _prepare_folder(config: TrainConfig, world: World, first_step: int) -> None:
    """Set aside what an older run left in the run folder, and write config.json."""
    world.wait()  # until every process has read its checkpoint
    if not world.is_main:
        return
    if config.resume == "never" and (old := set_aside_run(config.run_dir)):
        world.say(f"set aside the run that was in {config.run_dir}: {old}")
    for path in set_aside_newer(config.run_dir / "checkpoints", first_step):
        world.say(f"set aside {path}: this run starts from step {first_step}")
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config, config.run_dir / "config.json")


def _require_contrast(config: TrainConfig, world: World, manifest: Manifest) -> None:
    """Raise ValueError where clips cannot be contrasted with captions: one clip, or one caption for all."""
    if len({caption.text for captions in manifest.captions() for caption in captions}) < 2:
        raise ValueError(
            "all videos have the same caption, so that the contrastive loss has nothing to tell apart; use "
            f"{config.loss.flag_without_contrast}, or index the videos with captions of their own"
        )
    if (clips := config.contrasted_clips(world.size)) < 2:
        more = "raise --batch-size and --device-batch-size"
        if config.batch_size > 1:
            more = "raise --device-batch-size, or use --loss.contrast-over step"
        raise ValueError(f"the contrastive loss needs at least 2 clips, got {clips}; {more}")
