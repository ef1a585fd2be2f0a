"""The CPU time of a loader's stages, one by one, for bench/loader.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench.harness.tables import Row, Table
from bench.rivals.videomae_loader import Decoder, decode_only, time_clip
from dali_pipelines.types import ClipBatch, ClipRequest
from dali_pipelines.video.decode import decode_clips
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.data.manifest import Manifest
from tgmae.masks.noise_scorer import NoiseScorer
from tgmae.masks.select import select_masks

STAGES = ("decode", "to RGB", "crop and resize", "to float, normalise", "mask")
_BATCH = 8  # clips whose masks are drawn together


def stage_table(name: str, stages: dict[str, list[float]], whole: list[float]) -> Table:
    """Make the table of one loader: its stages, and what the whole loader takes beyond them, in CPU ms per clip."""
    timed = sum(statistics.mean(values) for values in stages.values())  # each round times different clips
    note = "to RGB is part of crop and resize; frames stay uint8" if name == "dali" else ""
    if name == "VideoMAE, decord":
        note = "decord converts to RGB while it decodes"
    rest = Row("hand-over", [value - timed for value in whole])
    rows = [*(Row(stage, values) for stage, values in stages.items()), rest, Row("whole", whole)]
    return Table(f"stages of {name}", "ms of CPU a clip", rows, note=note)


def time_stages(
    decoders: Sequence[Decoder], manifest: Manifest, requests: Sequence[ClipRequest], model: ModelConfig
) -> dict[str, dict[str, float]]:
    """Return the CPU milliseconds per clip that each stage of each loader takes in this process."""
    torch.set_num_threads(1)  # as in DataLoader's workers
    tube = MaskConfig(kind="tube")
    clock: dict[tuple[str, str], float] = {}

    def timed(name: str, stage: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        clock[name, stage] = clock.get((name, stage), 0.0) + time.process_time() - started
        return result

    for request in requests:
        file, video = manifest.file(request.row), manifest[request.row]
        decode_only(file, video, request)  # puts the file into the page cache, for all loaders alike
        for decoder in decoders:
            time_clip(decoder, manifest, request, model, tube, partial(timed, f"VideoMAE, {decoder}"))
        timed("dali", "decode", partial(decode_only, file, video, request))
        timed("dali", "decode, crop and resize", partial(decode_clips, file, video, [request], model.image_size))
    noise = NoiseScorer("tube", model.num_slots, model.patches_per_slot, torch.device("cpu"))
    frames = torch.zeros((_BATCH, model.num_frames, model.image_size, model.image_size, 3), dtype=torch.uint8)
    for first in range(0, len(requests), _BATCH):
        batch = tuple(requests[first : first + _BATCH])
        clips = ClipBatch(frames=frames, requests=batch, videos=tuple(manifest[request.row] for request in batch))
        timed("dali", "mask", partial(_draw_tube_masks, noise, clips, model))
    names = ["dali", *(f"VideoMAE, {decoder}" for decoder in decoders)]
    for name in names[1:]:
        clock[name, "to RGB"] = clock.pop((name, "decode, to RGB")) - clock[name, "decode"]
    clock["dali", "crop and resize"] = clock.pop(("dali", "decode, crop and resize")) - clock["dali", "decode"]
    return {name: {stage: 1000 * clock.get((name, stage), 0.0) / len(requests) for stage in STAGES} for name in names}


def _draw_tube_masks(noise: NoiseScorer, clips: ClipBatch, model: ModelConfig) -> None:
    select_masks(MaskConfig(kind="tube"), model, noise(clips))
