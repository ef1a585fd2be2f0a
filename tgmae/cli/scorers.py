"""The subcommands of tgmae-engine that look at a data set's clips: agree and distill."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from tgmae.cli.subcommands import ClipCommand
from tgmae.training.distillation import DistillConfig
from tgmae.training.parallel import choose_device


@dataclass(frozen=True)
class Agree(ClipCommand):
    """Compare every scorer with patch: how far their masks agree, and what each costs.

    Name what was made for this CLIP to have it compared too: --mask.student FILE, --mask.scores FOLDER.
    """

    clips: int = 32  # clips to compare on
    batch: int = 8  # clips scored at once
    out: Path | None = None  # JSON to write

    def run(self) -> None:
        from tgmae.masks.agreement import compare_scorers, load_clips

        if min(self.clips, self.batch) < 1:
            raise ValueError(f"--clips and --batch must be at least 1, got {self.clips} and {self.batch}")
        config, manifest = self.read()
        device = choose_device(config.device)
        batches = load_clips(config, manifest, self.clips, self.batch, device)
        reports, _ = compare_scorers(config, manifest, batches, device)
        k, n = config.mask.masked_per_slot(config.model.patches_per_slot), config.model.patches_per_slot
        table = Table(
            title=f"scorers against patch, {sum(len(clips.requests) for clips in batches)} clips, "
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
    """Train a small network to score patches like patch does, on this data set's own patches.

    A killed run goes on from OUT.partial. The measured agreement is printed and kept in the file.
    """

    out: Path | None = None  # file to write; by default student.safetensors beside the manifest
    check_split: str = "val"  # rows on which agreement is measured; the training rows where there are none
    options: Annotated[DistillConfig, tyro.conf.arg(name="")] = field(default_factory=DistillConfig)

    def run(self) -> None:
        from tgmae.data.manifest import read_manifest
        from tgmae.training.distillation import distill

        config, manifest = self.read()
        splits = set(read_manifest(self.manifest).table.column("split").to_pylist())
        held_out = self.read(split=self.check_split)[1] if self.check_split in splits else manifest
        out = self.out or self.manifest.parent / "student.safetensors"
        measured = distill(config, manifest, held_out, out, self.options, choose_device(config.device))
        where = f"split {self.check_split}" if held_out is not manifest else "the clips it was trained on"
        print(
            f"{out}: agreement with patch {measured['agreement']:.3f} (chance {measured['ratio']:.2f}, 5th percentile "
            f"{measured['agreement_p5']:.3f}), rank correlation {measured['rank_correlation']:.3f} on {where}. "
            f"Train with: --mask.scorer student --mask.student {out}"
        )
