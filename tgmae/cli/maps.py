"""The subcommands of tgmae-data that compute maps of whole videos: scores and motion."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from dali_pipelines.workers.processes import count_cores
from tgmae.cli.parser.subcommands import CLIP_FLAGS, ClipCommand, SharedCommand, name_some

if TYPE_CHECKING:  # --help does without pyarrow and numpy
    from dali_pipelines.workers.team import Team
    from tgmae.masks.maps.writer import BuildResult


@dataclass(frozen=True)
class Scores(ClipCommand, SharedCommand):
    """Compute CLIP's score maps of all videos and captions of a split once, for --mask.scorer cached.

    Each map holds the similarity of every patch of a frame to a caption. After an interruption the same command
    resumes. Under torchrun the processes share the work.
    """

    EXAMPLES: ClassVar = (
        "tgmae-data scores data/shapes/manifest.parquet  # Write data/shapes/scores-patch with the demo's tiny CLIP.",
        "tgmae-data scores data/ssv2/manifest.parquet --preset ssv2 --mask.scorer dense  "
        "# Use the CLIP of a preset, and score whole frames instead of single patches.",
    )
    COMMON: ClassVar = ("preset", "out", "mask.scorer", "clip.model", "data.split", "device")
    READS: ClassVar = (
        *(name for name in CLIP_FLAGS if name != "clip.cuda-graph"), "device", "data.root", "data.split",
        "captions.sources", "model.image-size", "model.patch-size",
        "mask.scorer", "mask.dense", "mask.student", "mask.no-caption",
    )  # fmt: skip

    CHOICES: ClassVar = {"mask.scorer": ("patch", "dense", "student")}  # cached reads the maps that are made here

    out: Path | None = None  # Folder to write. Default: scores-SCORER beside the manifest.
    every: int = 2  # Video frames from one map to the next.
    workers: int = field(default_factory=count_cores)  # Processes that decode.

    def share(self, team: Team) -> None:
        from tgmae.masks.choosing import scores_folder
        from tgmae.masks.maps.build_scores import build_scores
        from tgmae.training.parallel import choose_device

        with team.main_first():
            if self.every < 1:
                raise ValueError(f"--every must be at least 1, got {self.every}")
            config, manifest = self.read()
            device = choose_device(config.device)
        out = self.out or scores_folder(self.manifest, config.mask.scorer)
        cells = config.model.image_size // config.model.patch_size
        result = build_scores(
            manifest, out, config.clip, config.mask.tower(), cells=cells, patch_size=config.model.patch_size,
            every=self.every, device=device, num_workers=self.workers, team=team,
        )  # fmt: skip
        if team.is_main:
            _report(result, out, team, f"--mask.scorer cached --mask.scores {out}")


@dataclass(frozen=True)
class Motion(SharedCommand):
    """Extract the motion vectors of all videos once, for --mask.kind mgm, mgm_box and mgmae.

    H.264 and MPEG-4 files carry them. After an interruption the same command resumes. Under torchrun the processes
    share the work.
    """

    EXAMPLES: ClassVar = (
        "tgmae-data motion data/shapes/manifest.parquet  # Write data/shapes/motion.",
        "tgmae-data motion data/ssv2/manifest.parquet --split train --out motion-train  # Take one split only.",
    )

    # Parquet file made by `tgmae-data index` or `tgmae-data shapes`.
    manifest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST")]
    out: Path | None = None  # Folder to write. Default: motion beside the manifest.
    root: Path | None = None  # Folder of the videos, where it is not the one that the manifest names.
    split: str = ""  # Rows of the manifest to use; "" uses every row.
    workers: int = field(default_factory=count_cores)  # Processes that read videos.

    def share(self, team: Team) -> None:
        from dali_pipelines.video.motion import CODECS
        from tgmae.data.manifest import count_videos, open_manifest
        from tgmae.masks.choosing import motion_folder
        from tgmae.masks.maps.build_motion import build_motion

        with team.main_first():
            if self.workers < 1:
                raise ValueError(f"--workers must be at least 1, got {self.workers}")
            manifest = open_manifest(self.manifest, self.root).select_split(self.split)
        out = self.out or motion_folder(self.manifest)
        result = build_motion(manifest, out, self.workers, team)
        if not team.is_main:
            return
        silent = Counter(codec for video in result.skipped if (codec := manifest[video.row].codec) not in CODECS)
        broken = [video for video in result.skipped if manifest[video.row].codec in CODECS]
        _report(replace(result, skipped=broken), out, team, "" if silent else f"--mask.kind mgm --mask.motion {out}")
        if silent:
            codecs = ", ".join(f"{codec} ({count})" for codec, count in silent.items())
            message = (
                f"no motion vectors in {sum(silent.values())} of {count_videos(len(manifest))}: {codecs}; re-encode "
                f"the data set to H.264 with: tgmae-data compact {self.manifest} --out FOLDER"
            )
            if not result.num_videos + result.num_reused:
                raise ValueError(message)
            flags = f"--mask.kind mgm --mask.motion {out} --mask.no-motion exclude"
            print(f"{message}; or train without them: {flags}", file=sys.stderr)


def _report(result: BuildResult, out: Path, team: Team, flags: str) -> None:
    name_some("could not be read:", result.skipped)
    if result.skipped and not result.num_videos + result.num_reused:
        raise ValueError(f"none of {len(result.skipped)} videos could be read; {out} holds nothing to train with")
    name_some("could be read in part only:", result.broken)
    processes = f", {team.size} processes" if team.size > 1 else ""
    print(
        f"{out}: {result.num_videos} computed, {result.num_reused} already there, {len(result.skipped)} unreadable"
        + f" and {len(result.broken)} in part" * bool(result.broken)
        + "; "
        f"{result.num_bytes / 2**20:.1f} MiB, {result.seconds:.1f} s{processes}"
        + (f". Train with: {flags}" if flags else "")
    )
