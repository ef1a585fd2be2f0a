"""The CPU time of a loader's stages, one by one, for bench/loader.py."""

from __future__ import annotations

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

STAGES = ("decode", "to RGB", "decode, to RGB", "crop and resize", "to float, normalise", "mask")
_BATCH = 8  # clips whose masks are drawn together


def stage_table(name: str, stages: dict[str, list[float]], whole: list[float]) -> Table:
    """Make the table of one loader: its stages, their sum, and the whole loader, in CPU ms per clip.

    The stages are timed alone and at other times than the whole, so their difference would be mostly noise: it came
    out below 0 at times.
    """
    notes = {
        "dali": "converts to RGB while it resizes; frames stay uint8",
        "VideoMAE, decord": "decord converts to RGB while it decodes",
    }
    together = Row("stages together", [sum(values) for values in zip(*stages.values(), strict=True)])
    rows = [*(Row(stage, values) for stage, values in stages.items()), together, Row("whole loader", whole)]
    return Table(f"stages of {name}", "ms of CPU a clip", rows, note=notes.get(name, ""))


def time_stages(
    decoders: Sequence[Decoder], manifest: Manifest, requests: Sequence[ClipRequest], model: ModelConfig
) -> dict[str, dict[str, float]]:
    """Return the CPU milliseconds per clip that each stage of each loader takes in this process.

    Loaders differ in the stages that they have.
    """
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
    if (pyav := "VideoMAE, PyAV") in names:
        clock[pyav, "to RGB"] = clock.pop((pyav, "decode, to RGB")) - clock[pyav, "decode"]
    clock["dali", "crop and resize"] = clock.pop(("dali", "decode, crop and resize")) - clock["dali", "decode"]
    return {
        name: {stage: 1000 * clock[name, stage] / len(requests) for stage in STAGES if (name, stage) in clock}
        for name in names
    }


def _draw_tube_masks(noise: NoiseScorer, clips: ClipBatch, model: ModelConfig) -> None:
    select_masks(MaskConfig(kind="tube"), model, noise(clips))
