"""tgmae-viz masks | loss: pictures of masks and of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, get_args

import tyro

from tgmae.cli.subcommands import ClipCommand, run_subcommand
from tgmae.masks.config import MOTION_KINDS, MaskKind
from tgmae.training.parallel import choose_device


@dataclass(frozen=True)
class Masks(ClipCommand):
    """Draw clips with their caption, the score of each patch, and the masks of every strategy.

    Text-guided masks are left out with another --mask.kind, motion-guided ones without --mask.motion.
    """

    out: Path | None = None  # PNG to write; by default the manifest's name with .masks.png
    count: int = 10  # clips

    def run(self) -> None:
        from tgmae.masks.agreement import load_clips
        from tgmae.masks.scorer import bind_scorer
        from tgmae.pictures.masks import draw_masks

        if self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")
        config, manifest = self.read()
        device = choose_device(config.device)
        scorers = {
            kind: bind_scorer(replace(config, mask=replace(config.mask, kind=kind)), manifest, device)
            for kind in get_args(MaskKind)
            if (kind != "tgm" or config.mask.kind == "tgm") and (kind not in MOTION_KINDS or config.mask.motion)
        }
        for note in {scorer.note for scorer in scorers.values()} - {""}:
            print(note)
        [clips] = load_clips(config, manifest, self.count, self.count, device)
        scores = {kind: scorer(clips).float().cpu() for kind, scorer in scorers.items()}
        out = self.out or self.manifest.with_suffix(".masks.png")
        draw_masks(out, config, manifest, clips, scores)
        print(f"masks of {self.count} clips: {out}")


@dataclass(frozen=True)
class Loss:
    """Draw the loss curve of a run from its metrics."""

    run_dir: Annotated[Path, tyro.conf.Positional]

    def run(self) -> None:
        from tgmae.pictures.loss_curve import draw_loss

        path = draw_loss(self.run_dir)
        if path is None:
            raise ValueError(f"{self.run_dir} has no metrics yet")
        print(f"loss curve: {path}")


def main() -> None:
    run_subcommand("tgmae-viz", __doc__, {"masks": Masks, "loss": Loss})


if __name__ == "__main__":
    main()
