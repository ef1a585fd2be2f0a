"""tgmae-data shapes | index | show | scores | motion | compact: make data sets, look at them, and what masks need."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dali_pipelines.processes import count_cores
from tgmae.cli.compact import Compact
from tgmae.cli.maps import Motion, Scores
from tgmae.cli.subcommands import name_some, run_subcommand
from tgmae.data.indexing import IndexResult, index_folder
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.shapes.scenes import make_shapes


@dataclass(frozen=True)
class Shapes:
    """Make the demo data set: moving textured shapes, with captions and true boxes."""

    out: Annotated[Path, tyro.conf.Positional]  # folder to write into
    count: int = 320  # clips
    codec: Literal["h264", "vp9"] = "h264"  # mp4 or webm
    objects: Literal[1, 2] = 1  # in each clip; with two, each has a caption of its own
    camera: Literal["drifting", "still", "panning"] = "drifting"  # slower than the objects, not at all, or as fast
    seed: int = 0
    workers: int = field(default_factory=count_cores)

    def run(self) -> None:
        started = time.perf_counter()
        result = make_shapes(
            self.out, count=self.count, seed=self.seed, codec=self.codec, num_objects=self.objects,
            num_workers=self.workers, camera=self.camera,
        )  # fmt: skip
        _report(result, self.out / "manifest.parquet", started)


@dataclass(frozen=True)
class Index:
    """Write the manifest of a folder of videos; the label of a video is the folder it lies in, or what a CSV says."""

    folder: Annotated[Path, tyro.conf.Positional]  # the root that all paths are relative to
    out: Path | None = None  # manifest to write; by default manifest.parquet in the folder
    csv: Path | None = None  # path,label,caption,… (and split): take these videos instead of all in the folder
    split: str = "train"  # of videos for which the CSV names none
    min_frames: int = 16  # shorter videos are left out
    decode_all: bool = False  # decode every frame of every video: about ten times slower, finds what breaks half way
    workers: int = field(default_factory=count_cores)

    def run(self) -> None:
        started = time.perf_counter()
        out = self.out or self.folder / "manifest.parquet"
        if not os.access(next(p for p in [out.parent, *out.absolute().parents] if p.exists()), os.W_OK):
            raise ValueError(f"cannot write {out}; choose a place for the manifest with --out")
        result = index_folder(
            self.folder, out, csv_path=self.csv, split=self.split, min_frames=self.min_frames,
            decode_all=self.decode_all, num_workers=self.workers,
        )  # fmt: skip
        _report(result, out, started)


@dataclass(frozen=True)
class Show:
    """Summarise a manifest and draw a contact sheet of some of its videos."""

    manifest: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None  # PNG to write; by default the manifest's name with .png
    count: int = 24  # videos on the sheet
    seed: int = 0

    def run(self) -> None:
        from tgmae.pictures.contact_sheet import draw_contact_sheet

        manifest = read_manifest(self.manifest)
        Console().print(_summary(manifest))
        out = self.out or self.manifest.with_suffix(".png")
        draw_contact_sheet(manifest, out, self.count, self.seed)
        print(f"contact sheet: {out}")


def _summary(manifest: Manifest) -> Table:
    columns = manifest.table.to_pydict()
    frames, fps = np.subtract(columns["end_frame"], columns["start_frame"]), np.array(columns["fps"])
    hours = float((frames / np.where(fps > 0, fps, np.nan)).sum()) / 3600
    captions = np.array([len(texts) for texts in columns["captions"]])
    files = dict(zip(columns["path"], columns["num_bytes"], strict=True))  # several rows may be segments of one
    sizes = Counter(f"{w}×{h}" for w, h in zip(columns["width"], columns["height"], strict=True))
    labels = Counter(columns["label"])

    def most(counts: Counter[str], shown: int = 8) -> str:
        listed = escape(", ".join(f"{name or '(none)'} {count}" for name, count in counts.most_common(shown)))
        return listed + (f", and {len(counts) - shown} more" if len(counts) > shown else "")

    cut = f", segments of {len(files)} files" * (columns["num_frames"] != frames.tolist())
    table = Table(show_header=False, title=escape(f"{len(manifest)} videos{cut} below {manifest.root}"))
    table.add_row("length", f"{hours:.2f} h; frames {frames.min()} to {frames.max()}, median {np.median(frames):.0f}")
    table.add_row("size on disk", f"{sum(files.values()) / 2**20:.1f} MiB")
    table.add_row("codecs", most(Counter(columns["codec"])))
    table.add_row("pixel formats", most(Counter(columns["pixel_format"])))
    table.add_row("pictures", most(sizes))
    table.add_row("frame rates", most(Counter(f"{rate:.4g}" for rate in columns["fps"])))
    table.add_row("rotated", str(sum(rotation != 0 for rotation in columns["rotation"])))
    table.add_row("splits", most(Counter(columns["split"])))
    table.add_row(f"{len(labels)} labels", most(labels))
    table.add_row("captions", f"{captions.sum()}; {(captions == 0).sum()} videos have none")
    return table


def _report(result: IndexResult, out: Path, started: float) -> None:
    name_some("left out", result.excluded, f", listed in {result.report}")
    print(result.describe(out, time.perf_counter() - started))


def main() -> None:
    commands = {"shapes": Shapes, "index": Index, "show": Show, "scores": Scores, "motion": Motion, "compact": Compact}
    run_subcommand("tgmae-data", __doc__, commands)


if __name__ == "__main__":
    main()
