"""Score patches by their similarity to the clips' captions, with CLIP (Fan et al. 2024, section 3.3).

The paper masks every frame by itself. A token spans the frames of a tubelet, which therefore share a mask: the score of
a patch is the mean of its cosines in these frames.

Dimensions: B clips, T frames, S slots, K scored frames per slot, N patches per slot, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dali_pipelines.types import ClipBatch
from engines.clip_model import CLIPModel
from engines.patch_similarity import PatchSimilarity, make_patch_similarity
from tgmae.captions.clip_choice import advise_clip
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest


class TextScorer:
    """The scorer for `patch`, `dense` and `student`.

    num_clips   clips in a batch, where that is known
    """

    needs_text = True

    def __init__(
        self,
        config: InputConfig,
        manifest: Manifest,
        device: torch.device,
        clip: CLIPModel,
        num_clips: int | None = None,
    ) -> None:
        size = config.model.image_size
        self.slots, self.tubelet = config.model.num_slots, config.model.tubelet_size
        self.frames_per_tubelet = config.mask.frames_per_tubelet
        self.similarity: PatchSimilarity = make_patch_similarity(
            clip, config.clip, config.mask.tower(), config.model.patch_size, size, size, device,
            num_clips and num_clips * self.slots * self.frames_per_tubelet,
        )  # fmt: skip
        self.note = advise_clip(clip.is_demos, manifest)

    def __call__(self, clips: ClipBatch, text: Tensor | None = None) -> Tensor:
        """Return cosines float32 [B, S, N], the mean over the scored frames of each slot."""
        if text is None:
            raise ValueError("text-guided scores need the text of the batch (CaptionEmbeddings)")
        by_slot = clips.frames.view(-1, self.slots, self.tubelet, *clips.frames.shape[2:])
        chosen = by_slot[:, :, : self.frames_per_tubelet]
        flat = chosen.flatten(0, 2)  # [B·S·K, H, W, 3]
        texts = text.repeat_interleave(len(flat) // len(text), dim=0)
        cosines = self.similarity.compare(flat, texts[:, None])
        return cosines.view(*chosen.shape[:3], -1).mean(2)
