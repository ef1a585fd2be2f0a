"""tgmae-viz masks | loss | losses: draw masks, the loss of a run, and those of several runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, get_args

import tyro

from tgmae.cli.parser.subcommands import CLIP_FLAGS, SAMPLING_FLAGS, ClipCommand, Command, run_subcommand
from tgmae.config.masks import MOTION_KINDS, MaskConfig, MaskKind


@dataclass(frozen=True)
class Masks(ClipCommand):
    """Draw clips with their captions, the score of each patch, and the masks of every strategy.

    Motion-guided masks are drawn if --mask.motion names a folder.
    """

    EXAMPLES: ClassVar = (
        "tgmae-viz masks data/shapes/manifest.parquet  # Write data/shapes/manifest.masks.png.",
        "tgmae-viz masks data/ssv2/manifest.parquet --preset ssv2 --mask.motion data/ssv2/motion  "
        "# Use the CLIP and the geometry of a preset, and draw motion-guided masks as well.",
    )
    COMMON: ClassVar = ("preset", "count", "out", "text", "mask.ratio", "mask.scorer", "mask.motion", "clip.model")
    READS: ClassVar = (
        *SAMPLING_FLAGS, *CLIP_FLAGS,
        "mask.ratio", "mask.scorer", "mask.frames-per-tubelet", "mask.dense", "mask.scores", "mask.student",
        "mask.motion", "mask.flow", "mask.no-caption", "mask.no-motion",
    )  # fmt: skip

    CHOICES: ClassVar = {"mask.scorer": ("patch", "dense", "cached", "student")}  # auto is for training
    HINTS: ClassVar = {**ClipCommand.HINTS, "mask.kind": "all are drawn; --no-text leaves out text-guided masks"}
    WITHOUT_TEXT: ClassVar = "draw masks without text: --no-text"

    out: Path | None = None  # PNG file to write. Default: the manifest's name with .masks.png.
    count: int = 10  # Clips to draw.
    text: bool = True  # Draw text-guided masks. Without them neither captions nor CLIP are needed.

    def run(self) -> None:
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")
        from tgmae.masks.agreement import load_clips
        from tgmae.masks.motion_field import leave_out_motionless
        from tgmae.masks.scorer import bind_scorer
        from tgmae.pictures.masks import draw_masks
        from tgmae.training.parallel import choose_device

        config, manifest = self.read(with_text=self.text)
        if config.mask.motion and config.mask.no_motion == "exclude":
            manifest, note = leave_out_motionless(manifest)
            if note:
                print(note)
        device = choose_device(config.device)
        scorers = {
            kind: bind_scorer(replace(config, mask=replace(config.mask, kind=kind)), manifest, device)
            for kind in self.choose_kinds(config.mask)
        }
        for note in {scorer.note for scorer in scorers.values()} - {""}:
            print(note)
        [clips] = load_clips(config, manifest, self.count, self.count, device)
        scores = {kind: scorer(clips).float().cpu() for kind, scorer in scorers.items()}
        out = self.out or self.manifest.with_suffix(".masks.png")
        draw_masks(out, config, clips, scores)
        print(f"masks of {self.count} clip{'s' * (self.count != 1)}: {out}")

    def choose_kinds(self, mask: MaskConfig) -> list[MaskKind]:
        """Return the strategies that can be drawn, in the order of `MaskKind`."""
        motion: set[str] = set(MOTION_KINDS) if mask.motion else {"mgmae"} if mask.flow else set()
        text: set[str] = {"tgm"} if self.text else set()
        return [kind for kind in get_args(MaskKind) if kind in {"random", "tube"} | motion | text]


@dataclass(frozen=True)
class Loss(Command):
    """Draw the loss curve of a run from its metrics."""

    EXAMPLES: ClassVar = (
        "tgmae-viz loss runs/demo  # Write runs/demo/loss.png.",
        "tgmae-viz loss runs/ssv2  # The run may still be training.",
    )

    # Folder of a run, with a metrics.jsonl.
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]

    def run(self) -> None:
        from tgmae.pictures.loss_curve import draw_loss

        if not self.run_dir.is_dir():
            raise ValueError(f"there is no folder {self.run_dir}; expected the folder of a run, such as runs/demo")
        path = draw_loss(self.run_dir)
        if path is None:
            raise ValueError(f"{self.run_dir} has no metrics yet")
        print(f"loss curve: {path}")


@dataclass(frozen=True)
class Losses(Command):
    """Draw the contrastive and reconstruction losses of several runs in one picture.

    Solid lines are runs that optimise the contrastive loss, dashed ones only observe it. Labels say how the runs'
    configurations differ; runs that differ in the seed alone share one.
    """

    EXAMPLES: ClassVar = (
        "tgmae-viz losses runs/tube runs/mgm runs/tgm  # Write runs/losses.png.",
        "tgmae-viz losses runs/* --out figure4.png --smooth 0  # Write another file, and average nothing.",
    )

    # Folders of runs, each with a config.json and a metrics.jsonl.
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    out: Path | None = None  # PNG file to write. Default: losses.png beside the first run's folder.
    # Share of the longest run's steps over which curves are averaged; as they were logged they stand faintly behind.
    smooth: float = 0.05

    def run(self) -> None:
        from tgmae.pictures.run_losses import draw_run_losses

        if not self.run_dirs:
            raise ValueError("no run was given; expected the folders of runs, such as runs/tube runs/tgm")
        out = self.out or self.run_dirs[0].parent / "losses.png"
        for note in draw_run_losses(self.run_dirs, out, self.smooth):
            print(note)
        print(f"losses of {len(self.run_dirs)} run{'s' * (len(self.run_dirs) != 1)}: {out}")


COMMANDS = {"masks": Masks, "loss": Loss, "losses": Losses}


def main() -> None:
    run_subcommand(
        "tgmae-viz",
        "Draw the masks of clips and the losses of runs.",
        [Masks.EXAMPLES[0], Loss.EXAMPLES[0]],
        COMMANDS,
    )


if __name__ == "__main__":
    main()
