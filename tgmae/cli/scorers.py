"""The subcommands of tgmae-engine that work on the clips of a data set: agree and distill."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, ClassVar

import tyro

from tgmae.cli.parser.subcommands import CLIP_FLAGS, SAMPLING_FLAGS, ClipCommand
from tgmae.config.training import DistillConfig


@dataclass(frozen=True)
class Agree(ClipCommand):
    """Compare the masks of every scorer with those of the patch scorer, and measure the cost of each.

    The student and cached scores take part if --mask.student and --mask.scores name what was made for this CLIP.
    """

    EXAMPLES: ClassVar = (
        "tgmae-engine agree data/shapes/manifest.parquet  # Compare the scorers on the demo's clips.",
        "tgmae-engine agree data/ssv2/manifest.parquet --preset ssv2 --mask.student student.safetensors  "
        "# Compare a student as well, with the CLIP and the geometry of a preset.",
    )
    COMMON: ClassVar = ("preset", "clips", "batch", "out", "mask.student", "mask.scores", "clip.model", "device")
    READS: ClassVar = (
        *SAMPLING_FLAGS, *CLIP_FLAGS,
        "mask.ratio", "mask.frames-per-tubelet", "mask.scores", "mask.student", "mask.no-caption",
    )  # fmt: skip

    clips: int = 32  # Clips to compare on.
    batch: int = 8  # Clips to score at once.
    out: Path | None = None  # JSON file to write the table to.

    def run(self) -> None:
        if min(self.clips, self.batch) < 1:
            raise ValueError(f"--clips and --batch must be at least 1, got {self.clips} and {self.batch}")
        from rich.console import Console
        from rich.table import Table

        from tgmae.masks.agreement import compare_scorers, load_clips
        from tgmae.training.parallel import choose_device

        config, manifest = self.read()
        device = choose_device(config.device)
        batches = load_clips(config, manifest, self.clips, self.batch, device)
        reports, _ = compare_scorers(config, manifest, batches, device)
        k, n = config.mask.masked_per_slot(config.model.patches_per_slot), config.model.patches_per_slot
        num_clips = sum(len(clips.requests) for clips in batches)
        table = Table(
            title=f"scorers against patch, {num_clips} clip{'s' * (num_clips != 1)}, "
            f"{k} of {n} patches masked (chance agrees on {k / n:.2f})"
        )
        for heading in ("scorer", "agreement", "5th perc.", "rank corr.", "GFLOP/clip", "clips/s"):
            table.add_column(heading, justify="left" if heading == "scorer" else "right")
        for row in reports:
            table.add_row(
                row.name, f"{row.agreement:.3f}", f"{row.agreement_p5:.3f}", f"{row.rank_correlation:.3f}",
                f"{row.gflop_per_clip:,.4g}", f"{median(row.clips_per_s):,.4g}",
            )  # fmt: skip
        Console().print(table)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps([dataclasses.asdict(row) for row in reports], indent=2) + "\n")
            print(f"written to {self.out}")


@dataclass(frozen=True)
class Distill(ClipCommand):
    """Train a small network, the student, to score patches as the patch scorer does, on the data set's own clips.

    Prints the agreement of their masks and keeps it in the file. After an interruption the same command resumes from
    OUT.partial.
    """

    EXAMPLES: ClassVar = (
        "tgmae-engine distill data/shapes/manifest.parquet  # Write data/shapes/student.safetensors for the demo.",
        "tgmae-engine distill data/ssv2/manifest.parquet --preset ssv2 --rounds 1000  "
        "# Use the CLIP and the geometry of a preset, and train for longer.",
    )
    COMMON: ClassVar = ("preset", "out", "rounds", "clips", "batch", "clip.model", "data.num-workers", "device")
    READS: ClassVar = (
        *SAMPLING_FLAGS, *CLIP_FLAGS,
        "data.decode", "data.num-workers", "data.prefetch", "data.pipelines", "data.threads",
        "mask.ratio", "mask.frames-per-tubelet", "mask.no-caption",
    )  # fmt: skip

    out: Path | None = None  # File to write. Default: student.safetensors beside the manifest.
    # Split on which agreement is measured. Default: val if the manifest has it, else the split that is trained on.
    check_split: str | None = None
    options: Annotated[DistillConfig, tyro.conf.arg(name="")] = field(default_factory=DistillConfig)

    def run(self) -> None:
        from tgmae.data.manifest import read_manifest
        from tgmae.training.distillation import distill
        from tgmae.training.parallel import choose_device

        config, manifest = self.read()
        splits = read_manifest(self.manifest).splits()
        check_split = self.check_split or ("val" if "val" in splits else config.data.split)
        held_out = manifest if check_split == config.data.split else self.read(split=check_split)[1]
        out = self.out or self.manifest.parent / "student.safetensors"
        measured = distill(config, manifest, held_out, out, self.options, choose_device(config.device))
        is_held_out = config.data.split not in ("", check_split)
        where = f"split {check_split}" if is_held_out else "clips that it was trained on"
        k, n = config.mask.masked_per_slot(config.model.patches_per_slot), config.model.patches_per_slot
        print(
            f"{out}: agreement with patch {measured['agreement']:.3f} (chance {k / n:.2f}, 5th percentile "
            f"{measured['agreement_p5']:.3f}), rank correlation {measured['rank_correlation']:.3f} on {where}. "
            f"Train with: --mask.scorer student --mask.student {out}"
        )
