"""The loss on held-out clips, forward only.

Training is the same with it and without: it draws no random numbers and shares nothing with the step but the weights.
A validation runs after at least 16 times as many clips were trained on, and its forward passes cost about a third of a
step's work a clip, so it takes about 2 % of the time. The clips are decoded and masked once, before the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from dali_pipelines.open import open_pipeline
from tgmae.config.run import TrainConfig
from tgmae.data.sampling import FixedClips, ends_period
from tgmae.masks.scorer import BoundScorer
from tgmae.model.token_masks import TokenMasks
from tgmae.training.loader import InputStalled, Loader
from tgmae.training.parallel import World
from tgmae.training.step import TrainingStep
from tgmae.training.validation.held_out import HeldOut

# Number of the data set, frames uint8 [B, T, H, W, 3] of its clips in host memory, and their masks.
_Batch = tuple[int, Tensor, TokenMasks]


class Validation:
    """Call `measure` where `is_due` says so.

    held_out   None where there is nothing to validate on; then it is never due

    Each process holds its share of the clips in host memory: uint8 frames and int32 token numbers, 2.4 MB for a clip of
    16×224².
    """

    def __init__(
        self, config: TrainConfig, held_out: HeldOut | None, world: World, step: TrainingStep, last_step: int
    ) -> None:
        self.config, self.held_out, self.world, self.step, self.last_step = config, held_out, world, step, last_step
        self._batches: list[_Batch] | None = None
        self._clips_per_process: list[float] = []  # of each data set, mean over the processes

    def is_due(self, step: int) -> bool:
        """Return whether to validate after `step`, which depends on nothing but the configuration."""
        if self.held_out is None:
            return False
        return step == self.last_step or ends_period(step, self.config.batch_size, self.held_out.period)

    def measure(self, loader: Loader, is_stopping: Callable[[], bool]) -> tuple[dict[str, float], float]:
        """Return the mean loss over the held-out clips of all processes, and the seconds that it took.

        The loss is `validation_loss`, and with several data sets also `validation_loss/NAME` over the clips of each.
        One is missing where none of its clips can be read. Every process must call it, with its training loader: the
        scorer serves one thread at a time. Raises InputStalled as the loader does.
        """
        started = time.perf_counter()
        assert self.held_out is not None
        if self._batches is None:
            self._batches = self._load(self.held_out, loader, is_stopping)
        # Where processes share the network, all run as many passes: each gathers the weights.
        missing = self.world.max(len(self._batches))[0] - len(self._batches) if self.step.is_sharded else 0
        names, device = self.held_out.names, self.world.device
        totals = torch.zeros(len(names), dtype=torch.float64, device=device)
        for number, frames, masks in self._batches:
            visible, masked = masks.visible.to(device), masks.masked.to(device)
            mean = self.step.evaluate(frames.to(device), TokenMasks(visible=visible, masked=masked))
            totals[number] += mean * len(frames)
        if missing:
            self._keep_company(missing)
        sums, counts = [self.world.mean(total) for total in totals.tolist()], self._clips_per_process
        losses = {"validation_loss": sum(sums) / sum(counts)} if any(counts) else {}
        for name, total, count in zip(names, sums, counts, strict=True):
            if len(names) > 1 and count:
                losses[f"validation_loss/{name}"] = total / count
        return losses, time.perf_counter() - started

    def _keep_company(self, passes: int) -> None:
        """Run passes whose results nobody needs, while other processes have clips left."""
        model, device = self.config.model, self.world.device
        frames = torch.zeros(1, model.num_frames, *[model.image_size] * 2, 3, dtype=torch.uint8, device=device)
        tokens = torch.arange(model.num_tokens, dtype=torch.int32, device=device)[None]
        for _ in range(passes):
            self.step.evaluate(frames, TokenMasks(visible=tokens[:, :1], masked=tokens[:, 1:]))

    def _load(self, held_out: HeldOut, loader: Loader, is_stopping: Callable[[], bool]) -> list[_Batch]:
        """Decode and mask this process's share of the clips, and count those of all processes."""
        batches: list[_Batch] = []
        try:
            loader.finish_batch(is_stopping)
            for batch in self._decode(held_out, loader.scorer, is_stopping):
                batches.append(batch)
        except InputStalled:
            raise
        except ValueError as error:
            tqdm.write(f"held-out clips are missing: {error}")
        self._clips_per_process = [
            self.world.mean(sum(len(frames) for number, frames, _ in batches if number == own))
            for own in range(len(held_out.names))
        ]
        found, wanted = round(sum(self._clips_per_process) * self.world.size), len(held_out.requests)
        if found < wanted:
            self.world.say(f"validating on {found} of {wanted} held-out clips; the others could not be read")
        return batches

    def _decode(self, held_out: HeldOut, scorer: BoundScorer, is_stopping: Callable[[], bool]) -> Iterator[_Batch]:
        """Yield this process's share of the clips and their masks, without those of videos that cannot be read."""
        config, device = self.config, self.world.device
        share = held_out.requests[self.world.rank :: self.world.size]
        if not share:
            return
        size = min(config.device_batch_size, len(share))
        data = replace(config.data, repeat=1, pipelines=1, prefetch=1, weights=None)
        pipeline = open_pipeline(
            config.pipeline, held_out.manifest, FixedClips(share, size), data, config.model.image_size, 0, device
        )
        with closing(Loader(pipeline, scorer, config.mask, config.model, device)) as loader:
            for first in range(0, len(share), size):
                batch = loader.next_batch(is_stopping)
                unread = {video.row for video in batch.clips.skipped}
                # Copies of other clips stand in for those, and for what the last batch lacks.
                own = enumerate(share[first : first + size])
                readable = [place for place, request in own if request.row not in unread]
                for number in sorted({batch.clips.videos[place].data_set for place in readable}):
                    kept = [place for place in readable if batch.clips.videos[place].data_set == number]
                    masks = TokenMasks(visible=batch.masks.visible[kept].cpu(), masked=batch.masks.masked[kept].cpu())
                    yield number, batch.clips.frames[kept].cpu(), masks
