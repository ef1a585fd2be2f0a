"""tgmae-data import: from official annotation files and a folder of videos to a manifest."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from dali_pipelines.workers.processes import count_cores
from tgmae.cli.parser.subcommands import SharedCommand, name_some
from tgmae.data.importers.names import DatasetName, LabelKind
from tgmae.presets import PRESETS, PresetName

if TYPE_CHECKING:  # --help does without pyarrow, PyAV and numpy
    from dali_pipelines.workers.team import Team
    from tgmae.data.indexing import IndexResult
    from tgmae.data.manifest import Manifest

# The preset of each data set; of those without one the nearest: UCF101's for as few and as short clips, SSv2's, which
# does not flip, where captions name left and right.
_PRESETS: dict[DatasetName, PresetName] = {
    "ssv2": "ssv2", "k400": "k400", "ucf101": "ucf101", "hmdb51": "ucf101", "diving48": "k400", "epic55": "ssv2",
}  # fmt: skip


@dataclass(frozen=True)
class Import(SharedCommand):
    """Write the manifest of a published data set, from its official annotation files and a folder of its videos.

    Videos are found by name anywhere in the folder. What is missing is counted and listed beside the manifest. After an
    interruption the same command resumes. Under torchrun the processes share the work.
    """

    EXAMPLES: ClassVar = (
        "tgmae-data import ssv2 --annotations labels --videos 20bn-something-something-v2  "
        "# Write data/ssv2/manifest.parquet.",
        "tgmae-data import epic55 --annotations epic-kitchens-55-annotations --videos EPIC-KITCHENS --label verb  "
        "# Take the verbs as labels, not whole actions.",
    )

    # The data set: ssv2, k400, ucf101, hmdb51, diving48 or epic55.
    dataset: Annotated[DatasetName, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    annotations: Path  # Folder of the official annotation files, as they were released.
    videos: Path  # Folder of the videos, which all paths in the manifest are relative to.
    out: Path | None = None  # Manifest to write. Default: data/DATASET/manifest.parquet.
    label: LabelKind = "action"  # Label of an Epic-Kitchens segment: verb and noun, or one of them.
    min_frames: int = 16  # Leave out videos with fewer frames. Segments may be shorter.
    # Decode every frame: about ten times slower, and finds files that are corrupt part-way through.
    decode_all: bool = False
    workers: int = field(default_factory=count_cores)  # Processes that probe videos.

    def __post_init__(self) -> None:
        if self.label != "action" and self.dataset != "epic55":
            raise ValueError(f"--label {self.label} has no effect with {self.dataset}, only with epic55; leave it out")

    def share(self, team: Team) -> None:
        from tgmae.data.importers.datasets import DATASETS
        from tgmae.data.importers.epic55 import make_epic55
        from tgmae.data.importers.importing import plan_import, write_missing
        from tgmae.data.indexing import help_index, index_listing

        started = time.perf_counter()
        out = self.out or Path("data") / self.dataset / "manifest.parquet"
        if not team.is_main:
            help_index(
                self.videos, out, min_frames=self.min_frames, decode_all=self.decode_all, num_workers=self.workers,
                team=team,
            )  # fmt: skip
            return
        check_writable(out)
        dataset = make_epic55(self.label) if self.dataset == "epic55" else DATASETS[self.dataset]
        plan = plan_import(self.dataset, dataset, self.annotations, self.videos, out)
        print("\n".join(plan.lines), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        missing = out.with_name(out.name + ".missing.csv")
        write_missing(missing, plan.missing)
        if plan.missing:
            some = ", ".join(clip.path for clip in plan.missing[:3]) + ", …" * (len(plan.missing) > 3)
            are = "clip is" if len(plan.missing) == 1 else "clips are"
            print(f"{len(plan.missing):,} {are} missing ({some}); {missing} lists them", flush=True)
        result = index_listing(
            self.videos, out, plan.listing, origin=self.annotations, min_frames=self.min_frames,
            decode_all=self.decode_all, num_workers=self.workers, team=team,
        )  # fmt: skip
        manifest = report_index(result, out, started)
        print(result.table)
        print(f"train with: {suggest_training(self.dataset, manifest, out)}")


def check_writable(out: Path) -> None:
    """Raise ValueError where no manifest can be written at `out`, before a long job finds that out."""
    if not os.access(next(p for p in [out.parent, *out.absolute().parents] if p.exists()), os.W_OK):
        raise ValueError(f"cannot write {out}; choose a place for the manifest with --out")


def report_index(result: IndexResult, out: Path, started: float) -> Manifest:
    """Print what was left out, what slows decoding down, and how many videos the manifest at `out` has; return that.

    started   when the command began, on `time.perf_counter`
    """
    from tgmae.data.manifest import read_manifest
    from tgmae.data.probing import describe_far_keyframes

    name_some("left out", result.excluded, f", listed in {result.report}")
    manifest = read_manifest(out)
    if notice := describe_far_keyframes(manifest):
        print(notice)
    print(result.describe(out, time.perf_counter() - started))
    return manifest


def suggest_training(dataset: DatasetName, manifest: Manifest, out: Path) -> str:
    """Return the command that pretrains on an imported data set."""
    preset = _PRESETS[dataset]
    words = ["tgmae-train", preset]
    if out != PRESETS[preset].data.manifest:
        words += ["--data.manifest", str(out)]
    if dataset != preset:
        words += ["--run-dir", f"runs/{dataset}"]
    splits = manifest.splits()
    split = "train" if splits["train"] else next(iter(splits))
    if split != "train":
        words += ["--data.split", split]
    elif splits["test"] and not splits["val"]:
        words += ["--validation.split", "test"]
    rows = manifest.select_split(split)
    if not all(rows.captions()):
        words += ["--mask.no-caption", "label" if all(rows.table.column("label").to_pylist()) else "exclude"]
    return shlex.join(words)
