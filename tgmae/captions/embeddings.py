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
    """Text embeddings of every caption of a manifest, on one device.

    table  float32 [C, E], L2-normalised        note  how many captions CLIP truncates, "" for none

    Each distinct caption is encoded once, without gradients, and kept in `cache_dir`.
    """

    def __init__(self, manifest: Manifest, clip: CLIPModel, cache_dir: Path, device: torch.device) -> None:
        distinct = sorted({caption.text for captions in manifest.captions() for caption in captions})
        self._rows = {text: row for row, text in enumerate(distinct)}
        table, too_long = embed_captions(clip, distinct, cache_dir, device)
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
        rows = torch.tensor([self._rows[text] for text in texts], dtype=torch.int64)
        return self.table[rows.to(self.table.device, non_blocking=True)]
