"""The log of a run: its first lines, progress bar, metrics, and messages about what went wrong."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from dali_pipelines.types import ClipPipeline, ClipRequest
from engines.progress import shows_bars
from tgmae.config.masks import MOTION_KINDS
from tgmae.config.model import ModelConfig
from tgmae.config.paths import describe_paths
from tgmae.config.run import TrainConfig
from tgmae.data.manifest import Manifest, count_videos
from tgmae.data.mixing.figures import SetFigures, describe_sets, describe_videos
from tgmae.data.mixing.joined import DataSet
from tgmae.data.sampling import ends_period
from tgmae.model.pretraining import Losses
from tgmae.model.videomae import VideoMAE
from tgmae.telemetry.metrics import MetricsWriter, Throughput
from tgmae.training.async_losses import AsyncLosses, StepRecord
from tgmae.training.checkpoints.folder import newest_checkpoint
from tgmae.training.loader import Loader
from tgmae.training.parallel import World
from tgmae.training.step import TrainingStep

_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
_CONTRASTED = {
    "reconstruction": "reconstruction_loss", "contrastive": "contrastive_loss", "duplicate_pairs": "duplicate_pairs",
}  # fmt: skip
_EPOCHS_S = 30.0  # at least, from one line about epochs to the next


class RunLog:
    """Counts steps, reads their losses without making the GPU wait, and reports them.

    A terminal (stderr) shows a bar and, below it, the newest figures: on one line they would not fit 80 columns.
    Elsewhere each report is a line. Both have lines for the epochs that end.

    loss               mean over the steps of the last report and over all processes; NaN before the first report
    validation_loss    the newest; NaN before the first
    """

    def __init__(self, config: TrainConfig, world: World, manifest: Manifest, first_step: int, last_step: int) -> None:
        self.config, self.world, self.manifest, self.last_step = config, world, manifest, last_step
        self.clips_per_epoch = len(manifest) * config.data.repeat
        self.sets = SetFigures(manifest, config.data, config.seed)
        self.loss = self.grad_norm = self.validation_loss = math.nan
        self.metrics = MetricsWriter(config.run_dir, first_step, config.log.tensorboard) if world.is_main else None
        if self.metrics is not None and self.metrics.note:
            world.say(self.metrics.note)
        self.is_silent = not (world.is_main and config.log.progress)
        has_bar = not self.is_silent and shows_bars()
        self.bar = tqdm(total=last_step, initial=first_step, disable=not has_bar, dynamic_ncols=True, bar_format=_BAR)
        self.figures = tqdm(position=1, disable=not has_bar, dynamic_ncols=True, bar_format="{desc}")
        self.throughput, self.epochs = Throughput(), Throughput()
        self._epochs_from, self._epochs_said_s = first_step, time.perf_counter()
        self._reported = f"epoch {self._epoch(first_step):.1f}/{config.epochs}"
        self._losses = AsyncLosses(world.device)
        # Metrics by loss. What is minimised is the reconstruction loss where nothing is contrasted.
        self._names = {"total": "loss"} | (_CONTRASTED if config.loss.contrasts else {})

    def record(self, step: int, losses: list[Losses], grad_norms: Tensor, requests: list[ClipRequest]) -> None:
        """Take note of a step that was launched. Raises ValueError where an earlier loss was not finite.

        losses      on the device, those of each forward pass
        grad_norms  on the device, before clipping (`TrainingStep.update`)
        requests    the clips of the step, in the order of the forward passes
        """
        self.bar.update()
        self._losses.push(step, losses, grad_norms, requests)
        self._read(wait=False)

    def settle(self) -> None:
        """Wait for the losses of all steps. Raises ValueError where one is not finite."""
        self._read(wait=True)

    def _read(self, wait: bool) -> None:
        for seen in self._losses.pop(wait):
            if not seen.is_finite:
                raise ValueError(describe_bad_loss(seen, self.manifest, self.config.run_dir / "checkpoints"))
            losses = {self._names[name]: mean for name, mean in seen.means.items() if name in self._names}
            for window in (self.throughput, self.epochs):
                window.count(self.config.batch_size, losses)
            self.grad_norm = seen.grad_norms[0]

    def report(self, step: int, rate: float, skipped: Set[int], loader: Loader, training_step: TrainingStep) -> None:
        """Write the metrics since the last report. Every process must call it.

        skipped   rows of videos that could not be read
        """
        self.settle()
        stages = loader.clock.totals() | training_step.clock.totals()
        values = {
            "epoch": self._epoch(step),
            **self.throughput.report(loader.waited_s, stages),
            "learning_rate": rate,
            "grad_norm": self.grad_norm,
            "skipped_videos": len(skipped),
            **self.sets.skipped(skipped),
            **self.sets.epochs(step * self.config.batch_size // self.config.data.repeat),
        }
        values |= {name: self.world.mean(values[name]) for name in self._names.values()}
        head = training_step.model.head
        if self.config.loss.learn_temperature and head is not None:
            values["temperature"] = head.temperature
        self.loss = values["loss"]
        gc.collect(1)  # objects made since the last report
        if self.metrics is not None:
            self.metrics.write(step, values)
        self._reported = f"epoch {self._epoch(step):.1f}/{self.config.epochs}, {_describe(values)}"
        self._show_figures()
        if self.bar.disable:
            left = tqdm.format_interval((self.last_step - step) * values["step_ms"] / 1000)
            self._say(f"step {step}/{self.last_step}, {self._reported}{self._validated}, {left} left")

    def note_validation(self, step: int, losses: Mapping[str, float], seconds: float) -> None:
        """Write losses on held-out clips (`Validation.measure`) and leave their time out of the others' speed."""
        for window in (self.throughput, self.epochs):
            window.pause(seconds)
        self.validation_loss = losses.get("validation_loss", math.nan)
        self._show_figures()
        if self.metrics is not None and losses:
            values = {**losses, "validation_share": self.throughput.paused_share}
            self.metrics.write(step, {"epoch": self._epoch(step), **values})

    def show(self, step: int, picture: Path) -> None:
        """Put a PNG of the run into TensorBoard."""
        if self.metrics is not None:
            self.metrics.write_picture(step, picture)

    def sum_up_epochs(self, step: int, loader: Loader) -> None:
        """Say how the epochs went that have ended since the last time. Every process must call it, after every step.

        Nothing is said within `_EPOCHS_S` of the last time, so that a run of many short epochs stays readable: the next
        line covers them too.
        """
        if not self._ends_epoch(step):
            return
        now = time.perf_counter()
        (is_due,) = self.world.max(now >= self._epochs_said_s + _EPOCHS_S)
        if not is_due and step < self.last_step:
            return
        self.settle()
        values = self.epochs.report(loader.waited_s, {})
        values |= {name: self.world.mean(values[name]) for name in self._names.values()}
        first, last = math.floor(self._epoch(self._epochs_from)) + 1, math.floor(self._epoch(step))
        epochs = f"epoch {last}" if first == last else f"epochs {first} to {last}"
        if self._epochs_from and not self._ends_epoch(self._epochs_from):  # resumed
            epochs += f" from step {self._epochs_from}"
        self._epochs_from, self._epochs_said_s = step, now
        self._say(f"{epochs} of {self.config.epochs}: {_describe(values)}{self._validated}")

    def _ends_epoch(self, step: int) -> bool:
        return ends_period(step, self.config.batch_size, self.clips_per_epoch)

    def _epoch(self, step: int) -> float:
        return step * self.config.batch_size / self.clips_per_epoch

    def _show_figures(self) -> None:
        self.figures.set_description_str(f"{self._reported}{self._validated}")

    @property
    def _validated(self) -> str:
        return "" if math.isnan(self.validation_loss) else f", validation {self.validation_loss:.3f}"

    def _say(self, line: str) -> None:
        if not self.is_silent:
            self.world.say(line)

    def summarise(self, step: int, total: int, num_skipped: int, loader: Loader) -> str:
        """Sum up the whole run in one line."""
        return (
            f"step {step} of {total}, loss {self.loss:.3f}{self._validated}; "
            f"{self.throughput.summary(loader.waited_s)}, "
            f"{count_videos(num_skipped)} skipped; see {self.config.run_dir}"
        )

    def sync(self) -> None:
        """Flush the reports of this run to disk."""
        if self.metrics is not None:
            self.metrics.sync()

    def close(self) -> None:
        self.bar.close()
        self.figures.close()
        if self.metrics is not None:
            self.metrics.close()


def _describe(values: dict[str, float]) -> str:
    contrastive = f", contrastive {values['contrastive_loss']:.3f}" if "contrastive_loss" in values else ""
    return (
        f"loss {values['loss']:.3f}{contrastive}, {values['clips_per_s']:.1f} clips/s, "
        f"waiting {values['wait_share']:.0%}"
    )


def describe_run(
    config: TrainConfig, world: World, manifest: Manifest, pipeline: ClipPipeline, model: VideoMAE, use_bf16: bool,
    first_step: int, last_step: int, total_steps: int,
) -> str:  # fmt: skip
    """Say what this run was set up with, including the choices behind `auto`."""
    data, shape = config.data, config.model
    visible = shape.patches_per_slot - config.mask.masked_per_slot(shape.patches_per_slot)
    return (
        f"data      {describe_videos(manifest, data)}; "
        f"clips {shape.num_frames}×{shape.image_size}², {data.sampling} sampling, stride {data.stride}\n"
        + "".join(f"{' ' * 10}{line}\n" for line in describe_sets(manifest, data))
        + f"pipeline  {pipeline.describe()}\n"
        f"model     {_describe_network(config, model, use_bf16, world.size)}\n"
        f"mask      {_describe_mask(config, world.device.type)}, {visible * shape.num_slots} of {shape.num_tokens} "
        f"tokens visible\n{_describe_loss(config, world)}"
        f"run       {config.run_dir} on {world.size} × {world.device.type}, steps {first_step} to {last_step} of "
        f"{total_steps}; batch {config.batch_size}: {config.accumulation_steps(world.size)} × "
        f"{config.device_batch_size} clips on each"
    )


def _describe_network(config: TrainConfig, model: VideoMAE, use_bf16: bool, num_processes: int) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    network = [
        f"{millions:.1f} M parameters",
        f"attention {model.attention}",
        "bf16 autocast" if use_bf16 else "float32",
    ]
    if config.parallel == "fsdp":
        network.append(f"shared by {num_processes} processes" if num_processes > 1 else "whole in the one process")
    if config.activation_checkpointing:
        network.append("activation checkpointing")
    if config.compile:
        network.append("compiled blocks (the first step waits for them)")
    if config.cuda_graph:
        network.append("CUDA graph")
    return ", ".join(network)


def _describe_loss(config: TrainConfig, world: World) -> str:
    loss = config.loss
    if not loss.contrasts:
        return ""
    weighted = [(loss.reconstruction, "reconstruction"), (loss.contrastive, "contrastive")]
    terms = " + ".join(f"{weight:g} × {name}" for weight, name in weighted if weight)
    observed = " (observed only)" * loss.is_observing
    learned = ", learned" * loss.learn_temperature
    return (
        f"loss      {terms}; contrast{observed} over {config.contrasted_clips(world.size)} clips, "
        f"temperature {loss.temperature:g}{learned}, equal captions: {loss.duplicates}\n"
    )


def _describe_mask(config: TrainConfig, device_type: str) -> str:
    mask, clip = config.mask, config.clip
    if mask.kind in MOTION_KINDS:
        return f"{mask.kind}, motion from {describe_paths(mask.motion) if mask.is_of_folders else mask.flow}"
    if mask.kind != "tgm":
        return mask.kind
    which = {"dense": mask.dense, "cached": describe_paths(mask.scores), "student": mask.student}.get(mask.scorer)
    words = f"{mask.kind} ({mask.order}), scorer {mask.scorer}{f' ({which})' * bool(which)}, CLIP {clip.model}"
    if mask.scorer == "cached":
        return words
    frames = "both frames" if mask.frames_per_tubelet > 1 else "1 frame"
    return f"{words} in {clip.engine}, {clip.precision_on(device_type)}, {frames} of each tubelet"


def advise_scorer(config: TrainConfig) -> str:
    """Name the cheaper scorers where patch runs with a CLIP of real size; return "" for every other choice."""
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
    """Name the clips of the passes whose loss is not finite; of the whole step where only the gradient is not."""
    losses, size = seen.losses, len(seen.requests) // len(seen.losses)
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
    clips = [request for number in bad for request in seen.requests[number * size : (number + 1) * size]]
    newest = newest_checkpoint(checkpoints)
    return (
        f"loss is {sum(losses) / len(losses)} and the gradient's norm {seen.grad_norms[0]} at step {seen.step}; the "
        f"weights were not updated with it. {f'Newest checkpoint: {newest}. ' if newest else ''}The clips:\n"
        + "\n".join(f"  {request}  {manifest[request.row].name}" for request in clips)
    )


def describe_skipped(broken: DataSet, skipped: Set[int], loader: Loader, config: TrainConfig) -> str:
    """Say that too many videos of a data set could not be read, and name the first."""
    count, own = len(broken.rows_of(skipped)), broken.rows_of(loader.skipped)
    name = f"{broken.name}: " * bool(broken.name)
    found = [video for row, video in loader.skipped.items() if row in own]
    return (
        f"{name}{count} of {len(broken)} videos could not be read ({count / len(broken):.1%}, more than "
        f"--data.max-skipped {config.data.max_skipped:.1%}). Raise that share, or index the folder again with "
        "--decode-all. The first:\n" + "\n".join(f"  {video.path}: {video.reason}" for video in found[:5])
    )
