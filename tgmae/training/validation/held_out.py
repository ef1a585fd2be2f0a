"""The clips that a run validates on, and a scorer for them.

They are the same in every run on the same manifest, whatever its seed, processes and step: `ClipSampler` draws them as
the first epoch of seed 0, each with its crop, caption and mask seed. Each of several data sets has the clips that a run
on it alone has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from dali_pipelines.types import ClipRequest
from tgmae.captions.policy import require_captions
from tgmae.config.run import TrainConfig
from tgmae.data.manifest import Manifest, count_videos
from tgmae.data.mixing.joined import data_sets, join_sets
from tgmae.data.sampling import ClipSampler
from tgmae.masks.scorer import BoundScorer, bind_scorer

_SEED = 0
_TRAINED_PER_CLIP = 16  # clips that are trained on, at least, for each clip of a validation


@dataclass(frozen=True)
class HeldOut:
    """Held-out clips, one of each of some videos. Those of a data set stand together.

    names     of the data sets; "" for the only one
    manifest  videos that are not trained on
    period    clips that are trained on from one validation to the next
    """

    names: tuple[str, ...]
    manifest: Manifest
    requests: tuple[ClipRequest, ...]
    period: float

    def describe(self, config: TrainConfig) -> str:
        """Say which clips are held out, how often they are used and what they take, in one line."""
        model = config.model
        frames = model.num_frames * model.image_size**2 * 3
        count = len(self.requests)
        megabytes = count * (frames + 4 * model.num_tokens) / 1e6
        rows = [request.row for request in self.requests]
        sets = [(sum(row in one.rows_of(rows) for row in rows), one.name) for one in data_sets(self.manifest)]
        each = f" ({', '.join(f'{own} of {name}' for own, name in sets)})" * (len(sets) > 1)
        return (
            f"{count} clip{'s' * (count != 1)} from {count_videos(len(self.manifest))} of split "
            f"{config.validation.split}{each}, every {self.period / config.batch_size:.0f} steps; "
            f"{megabytes:.1f} MB in host memory"
        )


def bind_with_held_out(
    config: TrainConfig, videos: Manifest, manifest: Manifest, device: torch.device
) -> tuple[BoundScorer, HeldOut | None, str]:
    """Make the scorer of a run, which also scores its held-out clips.

    videos    all videos of the data set        manifest  those that are trained on

    Returns the scorer, the held-out clips (None where there are none, or the run does not validate), and what the user
    should know, "" for nothing. Raises ValueError where the videos that are trained on cannot be scored.
    """
    bind = partial(
        bind_scorer, config, manifest, device, num_clips=config.device_batch_size, needs_text=config.loss.contrasts
    )
    if not config.validation.every:
        return bind(), None, ""
    try:
        held_out, note = _choose_clips(config, videos, len(manifest))
        return bind(more=held_out.manifest), held_out, note
    except ValueError as error:
        return bind(), None, f"no validation: {error}"


def _choose_clips(config: TrainConfig, videos: Manifest, num_trained: int) -> tuple[HeldOut, str]:
    """Return the held-out clips, and what was done about missing captions. Raises ValueError where there are none.

    num_trained   videos that are trained on
    """
    options = config.validation
    if config.loss.reconstruction == 0:
        raise ValueError("--loss.reconstruction 0 reconstructs nothing")
    if config.data.split in ("", options.split):
        raise ValueError(f"--data.split {config.data.split or '(all)'} trains on split {options.split} too")
    sets, parts = data_sets(videos), list[Manifest]()
    requests, notes = list[ClipRequest](), list[str]()
    for one in sets:
        try:
            part, own, note = _choose_of_set(config, one.manifest)
        except ValueError as error:
            if len(sets) == 1:
                raise
            part, own, note = Manifest(one.manifest.table.slice(0, 0), one.manifest.root), (), f"no clips, {error}"
        requests += [replace(request, row=sum(map(len, parts)) + request.row) for request in own]
        parts.append(part)
        notes.append(f"held out: {f'{one.name}: ' * bool(one.name)}{note}" if note else "")
    if not requests:
        raise ValueError("; ".join(note.removeprefix("held out: ") for note in notes))
    names = [one.name for one in sets]
    period = max(options.every * num_trained * config.data.repeat, _TRAINED_PER_CLIP * len(requests))
    return HeldOut(tuple(names), join_sets(names, parts), tuple(requests), period), "\n".join(filter(None, notes))


def _choose_of_set(config: TrainConfig, videos: Manifest) -> tuple[Manifest, tuple[ClipRequest, ...], str]:
    """Return the held-out videos of a data set, its clips, and what was done about missing captions."""
    options, note = config.validation, ""
    manifest = videos.select_split(options.split)
    if shared := videos.select_split(config.data.split).splits()[options.split]:
        raise ValueError(f"{count_videos(shared)} of split {options.split} are in --data.split {config.data.split} too")
    if config.mask.kind == "tgm" or config.loss.contrasts:
        manifest, note = require_captions(manifest, config.mask.no_caption, chosen=config.captions)
    count = min(options.clips, len(manifest))
    sampler = ClipSampler(
        manifest=manifest, data=replace(config.data, repeat=1, weights=None), num_frames=config.model.num_frames,
        batch_size=count, seed=_SEED, captions=config.captions,
    )  # fmt: skip
    return manifest, sampler(0), note
