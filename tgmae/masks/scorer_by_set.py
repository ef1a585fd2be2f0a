"""A scorer for several data sets whose maps lie in folders: each clip goes to the scorer of its own data set.

Maps are found by the names of videos, which are unique within a data set only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dali_pipelines.types import ClipBatch


class ScorerBySet:
    """Scores clips by the number of their data set.

    scorers   of each data set; they read maps, and look at no frame and no text        note   what they have to say
    """

    needs_text = False

    def __init__(self, scorers: Sequence[Callable[[ClipBatch], Tensor]], note: str) -> None:
        self.scorers, self.note = tuple(scorers), note

    def __call__(self, clips: ClipBatch, text: Tensor | None = None) -> Tensor:
        """Return float32 [B, S, N] on the training device."""
        places: dict[int, list[int]] = {}
        for place, video in enumerate(clips.videos):
            places.setdefault(video.data_set, []).append(place)
        scores = []
        for number, own in places.items():
            requests, videos = zip(*((clips.requests[place], clips.videos[place]) for place in own), strict=True)
            # These frames belong to other clips. Nothing looks at them, and a view costs nothing.
            part = replace(clips, frames=clips.frames[: len(own)], requests=requests, videos=videos)
            scores.append(self.scorers[number](part))
        order = torch.tensor([place for own in places.values() for place in own])
        return torch.cat(scores)[order.argsort().to(scores[0].device)]
