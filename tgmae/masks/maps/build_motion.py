"""Read the motion vectors of a manifest's videos once, for `tgmae-data motion`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.types import Video
from dali_pipelines.video.decode import DecodeError
from dali_pipelines.video.motion import read_motion
from dali_pipelines.workers.pool import Death, map_in_workers
from dali_pipelines.workers.team import ALONE, Team
from tgmae.data.manifest import Manifest
from tgmae.masks.maps.store import digest_videos
from tgmae.masks.maps.writer import BuildResult, write_maps
from tgmae.masks.motion_field import COMMAND, MOTION_KEY


def build_motion(manifest: Manifest, out: Path, num_workers: int, team: Team = ALONE) -> BuildResult:
    """Write the missing parts of the manifest's motion vectors, or of a team this process's share (`write_maps`).

    Raises ValueError where `out` holds maps of something else.
    """

    def compute(rows: list[int]) -> Iterator[NDArray[np.int8] | str]:
        for _, motion in map_in_workers(partial(_read, manifest), rows, num_workers, lambda row: manifest[row].name):
            yield str(motion) if isinstance(motion, Death) else motion

    return write_maps(manifest, digest_videos(manifest), out, MOTION_KEY, COMMAND, compute, team)


def _read(manifest: Manifest, row: int) -> NDArray[np.int8] | str:
    video = manifest[row]
    try:
        if video.segment is None:
            return read_motion(manifest.file(row), video)
        whole = replace(video, segment=None, label="", captions=(), split="")
        return _read_whole(manifest.file(row), whole)[video.start : video.end]
    except (ValueError, DecodeError) as error:
        return str(error)


@lru_cache(maxsize=1)
def _read_whole(file: str, video: Video) -> NDArray[np.int8]:
    """Keep the motion of the last file: its segments, which mostly follow each other, are cut from it."""
    return read_motion(file, video)
