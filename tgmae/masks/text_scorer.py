"""Score the patches of a batch by their likeness to the clips' captions, with CLIP (Fan et al. 2024, section 3.3).

Dimensions: B clips, T frames, S slots, K scored frames a slot, N patches a slot, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dali_pipelines.types import ClipBatch
from engines.clip_model import CLIPModel, load_clip
from engines.patch_similarity import PatchSimilarity, make_patch_similarity
from tgmae.captions.embeddings import CaptionEmbeddings
from tgmae.config import InputConfig
from tgmae.data.manifest import Manifest


class TextScorer:
    """A scorer for `patch`, `dense` and `student`.

    clip   loaded already, where the caller has it
    """

    def __init__(
        self, config: InputConfig, manifest: Manifest, device: torch.device, clip: CLIPModel | None = None
    ) -> None:
        size = config.model.image_size
        clip = clip or load_clip(config.clip)
        self.slots, self.tubelet = config.model.num_slots, config.model.tubelet_size
        self.frames_per_tubelet = config.mask.frames_per_tubelet
        self.captions = CaptionEmbeddings(manifest, clip, config.clip.cache_dir, device)
        self.features: PatchSimilarity = make_patch_similarity(
            clip, config.clip, config.mask.tower(), config.model.patch_size, size, size, device
        )
        self.note = self.captions.note
        if config.clip.model == "shapes" and not (manifest.root / "boxes.parquet").exists():
            self.note += "\n" * bool(self.note) + (
                "these are no shapes clips, and --clip.model shapes knows nothing else: take a real CLIP, such as "
                "--clip.model ViT-B-32-quickgelu"
            )

    def __call__(self, clips: ClipBatch) -> Tensor:
        """Cosines float32 [B, S, N], the mean over the scored frames of each slot."""
        chosen = clips.frames.view(-1, self.slots, self.tubelet, *clips.frames.shape[2:])[
            :, :, : self.frames_per_tubelet
        ]
        flat = chosen.flatten(0, 2)  # [B·S·K, H, W, 3]
        texts = self.captions(clips.requests).repeat_interleave(len(flat) // len(clips.requests), dim=0)
        cosines = self.features.compare(flat, texts[:, None])
        return cosines.view(*chosen.shape[:3], -1).mean(2)
