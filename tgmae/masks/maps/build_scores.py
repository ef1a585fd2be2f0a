"""Compute the score maps of a manifest. Several processes and machines may share the work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dali_pipelines.workers.team import ALONE, Team
from engines.clip_model import CLIPModel, load_clip
from engines.config import CLIPConfig, TowerSpec
from engines.patch_similarity import PatchSimilarity, make_patch_similarity, make_tower
from tgmae.captions.clip_choice import advise_clip
from tgmae.captions.embeddings import CaptionEmbeddings
from tgmae.data.manifest import Manifest
from tgmae.masks.cached_scorer import COMMAND, score_key
from tgmae.masks.maps.frames import decode_in_workers
from tgmae.masks.maps.records import Broken
from tgmae.masks.maps.store import digest_videos
from tgmae.masks.maps.writer import BuildResult, write_maps

_MAX_TOWERS = 4  # dense towers kept, one per frame size; each holds a copy of CLIP


def build_scores(
    manifest: Manifest, out: Path, clip_config: CLIPConfig, spec: TowerSpec, *, cells: int, patch_size: int,
    every: int, device: torch.device, num_workers: int, team: Team = ALONE,
) -> BuildResult:  # fmt: skip
    """Write the missing parts of the manifest's score maps, or of a team this process's share (`write_maps`).

    cells   cells along the short side of a video        every   frames from one map to the next

    Raises ValueError where `out` holds maps made with other settings, and where CLIP gives NaN, naming video and
    caption; FileNotFoundError and OSError for files.
    """
    with team.main_first():  # which says what is wrong, and encodes captions that the others then read
        clip = load_clip(clip_config)
        captions = CaptionEmbeddings(manifest, clip, clip_config.cache_dir, device)
        for note in filter(None, [advise_clip(clip.is_demos, manifest), captions.note]):
            print(note)
    side = cells * patch_size
    tower = make_tower(clip, spec, patch_size, side, side)
    # The name of a dense tower contains its frame size, which differs from video to video.
    name = tower.name.partition("-")[0] if spec.kind == "dense" else tower.name
    # Videos differ in size and length, so a recorded CUDA graph would hardly ever fit.
    similarities = _SimilarityBySize(clip, replace(clip_config, cuda_graph=False), spec, patch_size, device)

    def compute(rows: list[int]) -> Iterator[NDArray[np.float16] | Broken | str]:
        decoded = decode_in_workers(manifest, rows, cells, patch_size, every, num_workers)
        for row, (frames, reason) in zip(rows, decoded, strict=True):
            if frames is None:
                yield reason
                continue
            video = manifest[row]
            texts = captions.of(video.texts)
            similarity = similarities(frames.shape[1], frames.shape[2])
            cosines = similarity.cosines(torch.from_numpy(frames).to(device), texts.expand(len(frames), -1, -1))
            if not bool(cosines.isfinite().all()):
                bad = [text for place, text in enumerate(video.texts) if not bool(cosines[:, place].isfinite().all())]
                raise ValueError(f"{video.name}, caption {bad[0]!r}: {similarity.describe_bad(cosines)}")
            grid = (frames.shape[1] // patch_size, frames.shape[2] // patch_size)
            maps = cosines.view(*cosines.shape[:2], *grid).half().cpu().numpy()
            yield Broken(maps, reason) if reason else maps

    key = score_key(clip.fingerprint, clip_config.identity(), name, patch_size, cells, every)
    return write_maps(manifest, digest_videos(manifest, "captions"), out, key, COMMAND, compute, team)


class _SimilarityBySize:
    """Makes a `PatchSimilarity` for each frame size. A dense tower fits one size only, the others fit all."""

    def __init__(
        self, clip: CLIPModel, config: CLIPConfig, spec: TowerSpec, patch_size: int, device: torch.device
    ) -> None:
        self.clip, self.config, self.spec, self.patch_size, self.device = clip, config, spec, patch_size, device
        self.made: dict[tuple[int, int], PatchSimilarity] = {}

    def __call__(self, height: int, width: int) -> PatchSimilarity:
        key = (height, width) if self.spec.kind == "dense" else (0, 0)
        if key not in self.made:
            if len(self.made) >= _MAX_TOWERS:
                self.made.pop(next(iter(self.made)))  # the one not used for longest
            self.made[key] = make_patch_similarity(
                self.clip, self.config, self.spec, self.patch_size, height, width, self.device
            )
        self.made[key] = self.made.pop(key)
        return self.made[key]
