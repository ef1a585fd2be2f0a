"""The subcommands of tgmae-data that compute maps of whole videos: scores and motion."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dali_pipelines.processes import count_cores
from tgmae.cli.subcommands import ClipCommand, name_some
from tgmae.data.manifest import read_manifest

if TYPE_CHECKING:  # both bring torch, which decode workers do without
    from tgmae.masks.maps.writer import BuildResult
    from tgmae.training.parallel import World


@dataclass(frozen=True)
class Scores(ClipCommand):
    """Compute score maps of all videos of a split and their captions once, for --mask.scorer cached.

    Any scorer can make them (--mask.scorer, by default patch). A killed run goes on where it was. Under torchrun the
    processes share the work.
    """

    out: Path | None = None  # folder to write; by default scores-<scorer> beside the manifest
    every: int = 2  # frames between two maps
    workers: int = field(default_factory=count_cores)  # processes that decode

    def run(self) -> None:
        from tgmae.masks.maps.build_scores import build_scores
        from tgmae.training import parallel as distributed

        if self.input.mask.scorer == "cached":
            raise ValueError("score maps are made by another scorer: --mask.scorer patch, dense or student")
        if self.every < 1:
            raise ValueError(f"--every must be at least 1, got {self.every}")
        config, manifest = self.read()
        out = self.out or self.manifest.parent / f"scores-{config.mask.scorer}"
        world = distributed.start(config.device)
        result = build_scores(
            manifest, out, config.clip, config.mask.tower(), cells=config.model.image_size // config.model.patch_size,
            patch_size=config.model.patch_size, every=self.every, device=world.device, num_workers=self.workers,
            share=world.rank, shares=world.size,
        )  # fmt: skip
        world.close()
        _report(result, out, world, f"--mask.scorer cached --mask.scores {out}")


@dataclass(frozen=True)
class Motion:
    """Read the motion vectors of all videos once, for --mask.kind mgm, mgm_box and mgmae.

    H.264 and MPEG-4 carry them. A killed run goes on where it was. Under torchrun the processes share the work.
    """

    manifest: Annotated[Path, tyro.conf.Positional]  # made by `tgmae-data index` or `tgmae-data shapes`
    out: Path | None = None  # folder to write; by default motion beside the manifest
    split: str = ""  # rows of the manifest to read; "" takes every row
    workers: int = field(default_factory=count_cores)

    def run(self) -> None:
        from dali_pipelines.video.motion import CODECS
        from tgmae.masks.maps.build_motion import build_motion
        from tgmae.training import parallel as distributed

        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")
        manifest = read_manifest(self.manifest).select_split(self.split)
        out = self.out or self.manifest.parent / "motion"
        world = distributed.start("cpu")
        result = build_motion(manifest, out, self.workers, world.rank, world.size)
        world.close()
        silent = Counter(codec for video in result.skipped if (codec := manifest[video.row].codec) not in CODECS)
        broken = [video for video in result.skipped if manifest[video.row].codec in CODECS]
        _report(replace(result, skipped=broken), out, world, f"--mask.kind mgm --mask.motion {out}" * (not silent))
        if silent:
            codecs = ", ".join(f"{codec} ({count})" for codec, count in silent.items())
            said = (
                f"{sum(silent.values())} of {len(manifest)} videos have no motion vectors: {codecs}; re-encode the "
                f"data set to H.264 with: tgmae-data compact {self.manifest} --out FOLDER"
            )
            if not result.num_videos + result.num_reused:
                raise ValueError(said)
            print(said, file=sys.stderr)


def _report(result: BuildResult, out: Path, world: World, flags: str) -> None:
    name_some("could not be read:", result.skipped)
    print(
        f"{out}: {result.num_videos} videos done, {result.num_reused} found, {len(result.skipped)} unreadable; "
        f"{result.num_bytes / 2**20:.1f} MiB, {result.seconds:.1f} s"
        f"{f' (process {world.rank + 1} of {world.size})' if world.size > 1 else ''}."
        + f" Train with: {flags}"
        * bool(flags)
    )
