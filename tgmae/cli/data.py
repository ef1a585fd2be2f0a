"""tgmae-data shapes | index | import | show | scores | motion | compact: make data sets, inspect and prepare them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from dali_pipelines.workers.processes import count_cores
from tgmae.cli.compact import Compact
from tgmae.cli.importing import Import, check_writable, report_index
from tgmae.cli.maps import Motion, Scores
from tgmae.cli.parser.subcommands import Command, SharedCommand, name_some, run_subcommand

if TYPE_CHECKING:  # --help does without pyarrow, PyAV and numpy
    from rich.table import Table

    from dali_pipelines.workers.team import Team
    from tgmae.data.manifest import Manifest


@dataclass(frozen=True)
class Shapes(Command):
    """Make the demo's data set: clips of moving textured shapes, with captions and true boxes."""

    EXAMPLES: ClassVar = (
        "tgmae-data shapes data/shapes  # Make the data set that tgmae-train uses by default.",
        "tgmae-data shapes data/two --objects 2 --camera panning --seed 1  # Make a harder one.",
    )

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]  # Folder to write.
    count: int = 320  # Clips to make.
    codec: Literal["h264", "vp9"] = "h264"  # h264 goes into .mp4 files, vp9 into .webm.
    objects: Literal[1, 2] = 1  # Shapes in each clip; with two, each has a caption of its own.
    # Motion of the background: slower than the shapes, none, or as fast as the shapes.
    camera: Literal["drifting", "still", "panning"] = "drifting"
    seed: int = 0  # Random seed for everything that is drawn.
    workers: int = field(default_factory=count_cores)  # Processes that draw and encode.

    def run(self) -> None:
        from tgmae.shapes.scenes import make_shapes

        started = time.perf_counter()
        result = make_shapes(
            self.out, count=self.count, seed=self.seed, codec=self.codec, num_objects=self.objects,
            num_workers=self.workers, camera=self.camera,
        )  # fmt: skip
        report_index(result, self.out / "manifest.parquet", started)


@dataclass(frozen=True)
class Index(SharedCommand):
    """Write the manifest of a folder of videos, which all other commands read.

    A video's label is the name of its folder, or what a CSV file says. After an interruption the same command resumes.
    Under torchrun the processes share the work.
    """

    EXAMPLES: ClassVar = (
        "tgmae-data index videos  # Write videos/manifest.parquet.",
        "tgmae-data index videos --csv captions.csv --out data/mine.parquet  # Take videos and captions from a table.",
    )

    # Root folder, which all paths in the manifest are relative to.
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    out: Path | None = None  # Manifest to write. Default: manifest.parquet in the folder.
    # CSV file that lists the videos to index: a column path, and perhaps label, split, caption, caption_2 ...
    csv: Path | None = None
    split: str = "train"  # Split of the videos for which the CSV file names none.
    min_frames: int = 16  # Leave out videos with fewer frames.
    # Decode every frame: about ten times slower, and finds files that are corrupt part-way through.
    decode_all: bool = False
    workers: int = field(default_factory=count_cores)  # Processes that probe videos.

    def share(self, team: Team) -> None:
        from tgmae.data.indexing import help_index, index_folder

        started = time.perf_counter()
        out = self.out or self.folder / "manifest.parquet"
        if not team.is_main:
            help_index(
                self.folder, out, min_frames=self.min_frames, decode_all=self.decode_all, num_workers=self.workers,
                team=team,
            )  # fmt: skip
            return
        check_writable(out)
        result = index_folder(
            self.folder, out, csv_path=self.csv, split=self.split, min_frames=self.min_frames,
            decode_all=self.decode_all, num_workers=self.workers, team=team,
        )  # fmt: skip
        report_index(result, out, started)
        if result.table:
            print(result.table)


@dataclass(frozen=True)
class Show(Command):
    """Summarise a manifest, and draw a contact sheet of some of its videos."""

    EXAMPLES: ClassVar = (
        "tgmae-data show videos/manifest.parquet  # Draw videos/manifest.png.",
        "tgmae-data show videos/manifest.parquet --count 60 --seed 1 --out sheet.png  # Draw more videos, and others.",
    )

    # Parquet file made by `tgmae-data index` or `tgmae-data shapes`.
    manifest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST")]
    out: Path | None = None  # PNG file to write. Default: the manifest's name with .png.
    root: Path | None = None  # Folder of the videos, where it is not the one that the manifest names.
    count: int = 24  # Videos on the sheet.
    seed: int = 0  # Random seed for the choice of videos.

    def run(self) -> None:
        from rich.console import Console

        from tgmae.data.manifest import open_manifest
        from tgmae.pictures.contact_sheet import draw_contact_sheet

        manifest = open_manifest(self.manifest, self.root)
        Console().print(_summary(manifest))
        out = self.out or self.manifest.with_suffix(".png")
        name_some("could not be read:", draw_contact_sheet(manifest, out, self.count, self.seed))
        print(f"contact sheet: {out}")


def _summary(manifest: Manifest) -> Table:
    import numpy as np
    from rich.markup import escape
    from rich.table import Table

    from tgmae.data.manifest import count_videos

    columns = manifest.table.to_pydict()
    frames, fps = np.subtract(columns["end_frame"], columns["start_frame"]), np.array(columns["fps"])
    hours = float((frames[fps > 0] / fps[fps > 0]).sum()) / 3600
    timeless = f" and {count_videos(int((fps == 0).sum()))} of unknown frame rate" * bool((fps == 0).any())
    captions = np.array([len(texts) for texts in columns["captions"]])
    files = dict(zip(columns["path"], columns["num_bytes"], strict=True))  # several rows may be segments of one
    sizes = Counter(f"{w}×{h}" for w, h in zip(columns["width"], columns["height"], strict=True))
    labels = Counter(columns["label"])

    def most(counts: Counter[str], shown: int = 8) -> str:
        listed = escape(", ".join(f"{name or 'none'} ({count})" for name, count in counts.most_common(shown)))
        return listed + (f", and {len(counts) - shown} more" if len(counts) > shown else "")

    cut = f", segments of {len(files)} file{'s' * (len(files) != 1)}" * (columns["num_frames"] != frames.tolist())
    table = Table(show_header=False, title=escape(f"{count_videos(len(manifest))}{cut} below {manifest.root}"))
    length = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    table.add_row(
        "length", f"{length}{timeless}; frames {frames.min()} to {frames.max()}, median {np.median(frames):.0f}"
    )
    table.add_row("size on disk", f"{sum(files.values()) / 2**20:.1f} MiB")
    table.add_row("codecs", most(Counter(columns["codec"])))
    table.add_row("pixel formats", most(Counter(columns["pixel_format"])))
    table.add_row("frame sizes", most(sizes))
    table.add_row("frame rates", most(Counter(f"{rate:.4g}" for rate in columns["fps"])))
    table.add_row("rotated", str(sum(rotation != 0 for rotation in columns["rotation"])))
    table.add_row("splits", most(manifest.splits()))
    table.add_row(f"{len(labels)} label{'s' * (len(labels) != 1)}", most(labels))
    table.add_row("captions", f"{captions.sum()}; {count_videos(int((captions == 0).sum()))} without any")
    return table


COMMANDS = {
    "shapes": Shapes, "index": Index, "import": Import, "show": Show, "scores": Scores, "motion": Motion,
    "compact": Compact,
}  # fmt: skip


def main() -> None:
    run_subcommand(
        "tgmae-data",
        "Make data sets, inspect them, and prepare what masks need.",
        [Index.EXAMPLES[0], Scores.EXAMPLES[0]],
        COMMANDS,
    )


if __name__ == "__main__":
    main()
