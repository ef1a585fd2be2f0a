"""The text of a batch: CLIP's embeddings of the captions that its requests drew.

Masks, the contrastive loss and retrieval all read the same embeddings.

Dimensions: B clips, C distinct captions, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dali_pipelines.types import ClipBatch
from engines.clip_model import CLIPModel
from engines.text_cache import embed_captions
from tgmae.data.manifest import Manifest


class CaptionEmbeddings:
    """Text embeddings of every caption of a manifest, and of `more` videos, on one device.

    table  float32 [C, E], L2-normalised        note  how many captions CLIP truncates, "" for none

    Each distinct caption is encoded once, without gradients, and kept in `cache_dir`.
    """

    def __init__(
        self, manifest: Manifest, clip: CLIPModel, cache_dir: Path, device: torch.device, more: Manifest | None = None
    ) -> None:
        distinct = _distinct(manifest)
        table, too_long = embed_captions(clip, distinct, cache_dir, device)
        if more is not None and (new := sorted(set(_distinct(more)) - set(distinct))):
            # In a call of their own: the rounding of the others must not depend on them.
            added, too_long_too = embed_captions(clip, new, cache_dir, device)
            distinct, table, too_long = distinct + new, torch.cat([table, added]), too_long + too_long_too
        self._rows = {text: row for row, text in enumerate(distinct)}
        self.table = table.to(device)
        self.note = ""
        if any(too_long):
            self.note = (
                f"{sum(too_long)} of {len(distinct)} captions are longer than CLIP's "
                f"{clip.tokenizer.context_length} tokens; the rest of them is cut off"
            )

    def __call__(self, clips: ClipBatch) -> Tensor:
        """Return the embeddings of the captions that a batch drew, float32 [B, E]."""
        return self.of(clips.captions())

    def of(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of captions of the manifest, float32 [len(texts), E]."""
        return self.table[self.numbers(texts)]

    def numbers(self, texts: Sequence[str]) -> Tensor:
        """Return the row of `table` of each caption, int64 [len(texts)]: the same in every process of a run."""
        rows = torch.tensor([self._rows[text] for text in texts], dtype=torch.int64)
        return rows.to(self.table.device, non_blocking=True)


def _distinct(manifest: Manifest) -> list[str]:
    return sorted({caption.text for captions in manifest.captions() for caption in captions})
