"""Scorers: a score for every patch. The patches that score highest in their slot are masked.

Nothing here imports CLIP unless masks are guided by text.

Dimensions: B clips, S slots, N patches per slot, E text embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dali_pipelines.types import ClipBatch
from tgmae.config.masks import MOTION_KINDS
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest
from tgmae.data.mixing.joined import DataSet, data_sets, naming_set
from tgmae.masks.choosing import choose_scorer
from tgmae.masks.noise_scorer import NoiseScorer

if TYPE_CHECKING:
    from engines.clip_model import CLIPModel
    from tgmae.captions.embeddings import CaptionEmbeddings


class Scorer(Protocol):
    """Scores the patches of a batch, from nothing but what the batch carries.

    note        what the user should know about the scores, "" for nothing
    needs_text  whether `text` must be given
    """

    note: str
    needs_text: bool

    def __call__(self, clips: ClipBatch, text: Tensor | None = None) -> Tensor:
        """Return float32 [B, S, N] on the training device.

        text   float32 [B, E], L2-normalised: the embedding of the caption that each request drew
        """
        ...


def make_scorer(
    config: InputConfig,
    manifest: Manifest,
    device: torch.device,
    clip: CLIPModel | None = None,
    num_clips: int | None = None,
) -> Scorer:
    """Make the scorer that `config.mask` names, or that auto stands for.

    clip        the CLIP that `config.clip` names, where the caller has loaded it
    num_clips   clips in a batch, where that is known

    Raises ValueError where the scores cannot be computed.
    """
    config, _ = choose_scorer(config, manifest)
    model, mask = config.model, config.mask
    if mask.is_of_folders and len(sets := data_sets(manifest)) > 1:
        return _make_scorer_by_set(config, sets, device)
    if mask.kind in MOTION_KINDS:
        from tgmae.masks.motion_scorer import MotionScorer

        return MotionScorer(config, manifest, device)
    if mask.kind == "random" or mask.kind == "tube":
        return NoiseScorer(mask.kind, model.num_slots, model.patches_per_slot, device)
    if mask.scorer == "cached":
        from tgmae.masks.cached_scorer import CachedScorer

        return CachedScorer(config, manifest, device)
    from engines.clip_model import load_clip
    from tgmae.masks.text_scorer import TextScorer

    return TextScorer(config, manifest, device, clip or load_clip(config.clip), num_clips)


def _make_scorer_by_set(config: InputConfig, sets: Sequence[DataSet], device: torch.device) -> Scorer:
    from tgmae.masks.scorer_by_set import ScorerBySet

    scorers, notes = [], []
    for one in sets:
        with naming_set(one):
            own = replace(config, mask=config.mask.of_data_set(one.number))
            scorers.append(make_scorer(own, one.manifest, device))
        notes += [f"{one.name}: {line}" for line in scorers[-1].note.splitlines()]
    return ScorerBySet(scorers, "\n".join(notes))


@dataclass(frozen=True)
class BoundScorer:
    """A scorer together with the captions of the data set: it finds the text of a batch, and scores the batch.

    captions   None where nothing needs text
    """

    scorer: Scorer
    captions: CaptionEmbeddings | None

    @property
    def note(self) -> str:
        """What the user should know about scores and captions, "" for nothing."""
        return "\n".join(filter(None, [self.captions.note if self.captions else "", self.scorer.note]))

    @property
    def text_width(self) -> int | None:
        """Width of the embeddings of captions; None where nothing needs text."""
        return None if self.captions is None else int(self.captions.table.shape[1])

    def text(self, clips: ClipBatch) -> Tensor | None:
        """Return the embedding of the caption that each request drew, float32 [B, E]; None where nothing needs text."""
        return None if self.captions is None else self.captions(clips)

    def caption_numbers(self, clips: ClipBatch) -> Tensor | None:
        """Return numbers int64 [B] that are equal where requests drew equal captions; None where nothing needs text."""
        return None if self.captions is None else self.captions.numbers(clips.captions())

    def __call__(self, clips: ClipBatch) -> Tensor:
        """Return scores float32 [B, S, N] on the training device."""
        return self.score(clips, self.text(clips))

    def score(self, clips: ClipBatch, text: Tensor | None) -> Tensor:
        """Return scores float32 [B, S, N] on the training device, given the text of the batch.

        Raises ValueError, naming videos, where a score is NaN or infinite: it would mask in silence. The check makes
        the calling thread wait for the scores.
        """
        scores = self.scorer(clips, text)
        finite = scores.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            pairs = zip(clips.videos, finite.tolist(), strict=True)
            named = ", ".join(dict.fromkeys(video.name for video, is_finite in pairs if not is_finite))
            raise ValueError(f"the scores of {named} contain NaN or infinity, which would decide their masks")
        return scores


def bind_scorer(
    config: InputConfig,
    manifest: Manifest,
    device: torch.device,
    clip: CLIPModel | None = None,
    num_clips: int | None = None,
    more: Manifest | None = None,
    needs_text: bool = False,
) -> BoundScorer:
    """Make the scorer that `config.mask` names, and its captions, with one CLIP for both.

    clip, num_clips   as for `make_scorer`
    more              further videos that it will score; the scores of the others do not depend on them
    needs_text        whether something else reads the text of the batches, such as the contrastive loss

    Raises ValueError where the scores cannot be computed.
    """
    config, _ = choose_scorer(config, manifest)
    videos = manifest if more is None else manifest.joined(more)
    if not needs_text and (config.mask.kind != "tgm" or config.mask.scorer == "cached"):
        return BoundScorer(make_scorer(config, videos, device), None)
    from engines.clip_model import load_clip
    from tgmae.captions.embeddings import CaptionEmbeddings

    clip = clip or load_clip(config.clip)
    captions = CaptionEmbeddings(manifest, clip, config.clip.cache_dir, device, more)
    return BoundScorer(make_scorer(config, videos, device, clip, num_clips), captions)
