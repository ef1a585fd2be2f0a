"""Compute score maps for a manifest, part by part; several processes and machines may share the work."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from engines.clip import Clip, load_clip
from engines.features import Features, make_features, make_tower
from tgmae.config import ClipConfig, MaskConfig
from tgmae.manifest import Manifest
from tgmae.scoring.captions import CaptionEmbeddings, captions_digest
from tgmae.scoring.maps import PART_VIDEOS, SCHEMA, CacheKey, part_path, write_key
from tgmae.scoring.pictures import decode_in_workers
from tgmae.types import SkippedVideo

_MAX_TOWERS = 4  # dense towers kept for frame sizes met before; each holds a copy of CLIP


@dataclass(frozen=True)
class BuildResult:
    num_videos: int  # scored now
    num_reused: int  # found in parts written before
    skipped: list[SkippedVideo]
    num_bytes: int  # of this process's parts
    seconds: float


def build_scores(
    manifest: Manifest, out: Path, clip_config: ClipConfig, mask: MaskConfig, *, cells: int, patch_size: int,
    every: int, device: torch.device, num_workers: int, share: int = 0, shares: int = 1,
) -> BuildResult:  # fmt: skip
    """Write the parts `share`, `share` + `shares`, … of the manifest's score maps that are not there yet.

    cells   patches along a clip's short side        every   frames between two maps

    Raises ValueError where `out` holds maps made with other settings, FileNotFoundError and OSError for files.
    """
    started = time.perf_counter()
    clip = load_clip(clip_config)
    side = cells * patch_size
    tower = make_tower(clip, mask, patch_size, side, side)
    # A dense tower's name tells its frame size, which differs from video to video.
    name = tower.name.partition("-")[0] if mask.scorer == "dense" else tower.name
    write_key(out, CacheKey(clip=clip.fingerprint, tower=name, patch_size=patch_size, cells=cells, every=every))
    captions = CaptionEmbeddings(manifest, clip, clip_config.cache_dir, device)
    scorers = _ScorerBySize(clip, clip_config, mask, patch_size, device)

    digests = [captions_digest(texts) for texts in manifest.table.column("captions").to_pylist()]
    parts = range(share, -(-len(manifest) // PART_VIDEOS), shares)
    rows_of = {part: range(part * PART_VIDEOS, min((part + 1) * PART_VIDEOS, len(manifest))) for part in parts}
    for part in parts:  # what a killed run left behind
        for half_written in out.glob(f"{part_path(out, part).name}.*.tmp"):
            half_written.unlink()
    todo = [part for part in parts if not _is_done(part_path(out, part), manifest, digests, rows_of[part])]
    rows = [row for part in todo for row in rows_of[part]]
    pictures = decode_in_workers(manifest, rows, cells, patch_size, every, num_workers)
    skipped: list[SkippedVideo] = []
    bar = tqdm(total=len(rows), desc="scoring", unit="video")
    for part in todo:
        records: list[dict[str, object]] = []
        for row in rows_of[part]:
            frames = next(pictures)
            maps = np.zeros((0, 0, 0, 0), np.float16)
            if isinstance(frames, str):
                skipped.append(SkippedVideo(row=row, path=manifest[row].path, reason=frames))
            else:
                texts = captions.of_row(row)
                features = scorers(frames.shape[1], frames.shape[2])
                cosines = features.compare(torch.from_numpy(frames).to(device), texts.expand(len(frames), -1, -1))
                grid = (frames.shape[1] // patch_size, frames.shape[2] // patch_size)
                maps = cosines.view(*cosines.shape[:2], *grid).half().cpu().numpy()
            records.append(
                {
                    "path": manifest[row].path,
                    "captions": digests[row],
                    "shape": list(maps.shape),
                    "maps": maps.tobytes(),
                }
            )
            bar.update()
        _write_part(part_path(out, part), records)
    bar.close()
    sizes = [part_path(out, part).stat().st_size for part in parts]
    reused = sum(len(rows_of[part]) for part in parts) - len(rows)
    return BuildResult(len(rows) - len(skipped), reused, skipped, sum(sizes), time.perf_counter() - started)


class _ScorerBySize:
    """Features for frames of one size after another; a dense tower belongs to one size, the others fit all."""

    def __init__(self, clip: Clip, config: ClipConfig, mask: MaskConfig, patch_size: int, device: torch.device) -> None:
        self.clip, self.config, self.mask, self.patch_size, self.device = clip, config, mask, patch_size, device
        self.made: dict[tuple[int, int], Features] = {}

    def __call__(self, height: int, width: int) -> Features:
        key = (height, width) if self.mask.scorer == "dense" else (0, 0)
        if key not in self.made:
            if len(self.made) >= _MAX_TOWERS:
                self.made.pop(next(iter(self.made)))
            self.made[key] = make_features(
                self.clip, self.config, self.mask, self.patch_size, height, width, self.device
            )
        return self.made[key]


def _is_done(path: Path, manifest: Manifest, digests: list[str], rows: range) -> bool:
    """Whether a part holds just these rows, for just these captions; one with an unreadable video is tried again."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    found = (table.column(name).to_pylist() for name in ("path", "captions", "shape"))
    wanted = manifest.table.column("path").slice(rows.start, len(rows)).to_pylist()
    paths, captions, shapes = found
    return paths == wanted and captions == [digests[row] for row in rows] and all(shape[0] for shape in shapes)


def _write_part(path: Path, records: list[dict[str, object]]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    table = pa.Table.from_pylist(records, schema=SCHEMA)
    with pa.ipc.new_file(temporary, SCHEMA) as writer:
        writer.write_table(table)
    os.replace(temporary, path)
