"""Which patches are masked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engines.config import LastBlock, TowerSpec
from tgmae.config.paths import Paths, simplify_paths

MaskKind = Literal["tgm", "mgm", "mgm_box", "mgmae", "random", "tube"]
MOTION_KINDS = ("mgm", "mgm_box", "mgmae")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Every mask is a score for each patch; the patches that score highest in their slot are masked."""

    # What decides which patches of a slot (the frames of one tubelet) are masked.
    #   tgm      similarity to the caption (Fan et al. 2024, section 3.3)
    #   mgm      speed of motion (after Fan et al. 2023)
    #   mgm_box  a box around the fastest motion, carried along by it
    #   mgmae    everything outside random bumps that the motion carries along (Huang et al. 2023)
    #   random   every slot draws its own patches, all the same number (ST-MAE's mask, stratified by slot)
    #   tube     all slots share one draw (VideoMAE)
    kind: MaskKind = "tgm"
    ratio: float = 0.6  # Share of the patches to mask: floor(ratio · N) of the N patches of each slot.
    # Mask the patches that score highest (top) or lowest (bottom; table 5b of Fan et al. 2024).
    order: Literal["top", "bottom"] = "top"
    # How tgm scores patches.
    #   auto     score maps found beside the manifest; else patch, if CLIP is as tiny as the demo's
    #   patch    the paper's: each patch through CLIP
    #   dense    whole frames through CLIP: less work
    #   cached   score maps by `tgmae-data scores`
    #   student  a small network made by `tgmae-engine distill`
    scorer: Literal["auto", "patch", "dense", "cached", "student"] = "auto"
    # Frames of each tubelet that CLIP scores: 1 takes the first frame, 2 averages the cosines of both.
    frames_per_tubelet: Literal[1, 2] = 2
    # How the dense scorer changes CLIP's last block, so that patch tokens compare with captions; named after papers.
    dense: LastBlock = "clearclip"
    scores: Paths | None = None  # Score maps made by `tgmae-data scores`, for the cached scorer; one folder or several.
    student: Path | None = None  # File made by `tgmae-engine distill`, for the student scorer.
    motion: Paths | None = None  # Made by `tgmae-data motion`. Default: beside the manifest.
    flow: Path | None = None  # RAFT checkpoint from torchvision: mgmae follows optical flow, not --mask.motion.
    # What to do with videos that have no caption: fail and list them (error), skip them (exclude), or use the class
    # label as the caption (label).
    no_caption: Literal["error", "exclude", "label"] = "error"
    # What to do with videos without motion vectors: fail and list them (error) or skip them (exclude).
    no_motion: Literal["error", "exclude"] = "error"

    def __post_init__(self) -> None:
        for name in ("scores", "motion"):
            object.__setattr__(self, name, simplify_paths(getattr(self, name), f"--mask.{name}"))
        if not 0 < self.ratio < 1:
            raise ValueError(f"--mask.ratio must lie strictly between 0 and 1, got {self.ratio}")
        if self.kind == "tgm":
            if self.scorer == "cached" and self.scores is None:
                raise ValueError(
                    "--mask.scorer cached needs --mask.scores FOLDER; make it with: tgmae-data scores MANIFEST"
                )
            if self.scorer == "student" and self.student is None:
                raise ValueError(
                    "--mask.scorer student needs --mask.student FILE; make it with: tgmae-engine distill MANIFEST"
                )

    @property
    def is_of_folders(self) -> bool:
        """Whether masks are made from maps of whole videos, in folders."""
        if self.kind in MOTION_KINDS:
            return not (self.kind == "mgmae" and self.flow)
        return self.kind == "tgm" and self.scorer == "cached"

    def of_data_set(self, number: int) -> MaskConfig:
        """Return the same for one data set: with its own folders, where there are several."""
        scores, motion = (
            folders[number] if isinstance(folders, tuple) else folders for folders in (self.scores, self.motion)
        )
        return replace(self, scores=scores, motion=motion)

    def masked_per_slot(self, patches_per_slot: int) -> int:
        """Return floor(ratio · N), the number of masked patches in each slot."""
        # A product such as .7 · 10 may come out just below its whole number in binary.
        return math.floor(self.ratio * patches_per_slot + 1e-9)

    def tower(self) -> TowerSpec:
        """Return the network that scores patches; patch for auto, and for cached, whose maps were made by any."""
        kind = "patch" if self.scorer == "auto" or self.scorer == "cached" else self.scorer
        return TowerSpec(kind=kind, last_block=self.dense, student=self.student)
