"""Captions of a manifest: which ones count, and their embeddings, computed once and kept on disk.

Dimensions: B clips, C distinct captions, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_pipelines.types import ClipRequest
from engines.text_cache import embed_captions
from tgmae.data.manifest import Manifest

if TYPE_CHECKING:  # open_clip takes seconds to import, and whoever masks without text does without it
    from engines.clip_model import CLIPModel


class CaptionEmbeddings:
    """Text embeddings of every caption of a manifest, on one device.

    table  float32 [C, E], L2-normalised        note  how many captions CLIP cannot read to their end, "" for none
    """

    def __init__(self, manifest: Manifest, clip: CLIPModel, cache_dir: Path, device: torch.device) -> None:
        rows = manifest.table.column("captions").to_pylist()
        distinct = sorted({text for captions in rows for text in captions})
        number = {text: index for index, text in enumerate(distinct)}
        self._numbers: NDArray[np.int64] = np.array([number[text] for captions in rows for text in captions], np.int64)
        self._starts: NDArray[np.int64] = np.cumsum([0, *(len(captions) for captions in rows)])
        table, too_long = embed_captions(clip, distinct, cache_dir, device)
        self.table = table.to(device)
        self.note = (
            f"{sum(too_long)} of {len(distinct)} captions are longer than CLIP's "
            f"{clip.tokenizer.context_length} tokens; what is beyond does not count"
        ) * any(too_long)

    def __call__(self, requests: Sequence[ClipRequest]) -> Tensor:
        """The embeddings of the requests' captions, float32 [B, E]."""
        index = [int(self._numbers[self._starts[request.row] + request.caption]) for request in requests]
        return self.table[torch.tensor(index).to(self.table.device, non_blocking=True)]

    def of_row(self, row: int) -> Tensor:
        """The embeddings of all captions of one video, float32 [captions, E]."""
        return self.table[torch.from_numpy(self._numbers[self._starts[row] : self._starts[row + 1]])]
