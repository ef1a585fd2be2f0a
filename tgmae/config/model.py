"""Geometry of the clip and the network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Geometry of the clip and the network.

    The defaults of the class, not of the presets, are VideoMAE ViT-B.
    """

    image_size: int = 224  # Height and width of a clip, in pixels.
    num_frames: int = 16  # Frames in a clip.
    patch_size: int = 16  # Height and width of a patch, in pixels.
    tubelet_size: int = 2  # Frames that a token spans.
    width: int = 768  # Encoder width.
    depth: int = 12  # Encoder blocks.
    num_heads: int = 12  # Attention heads in the encoder.
    decoder_width: int = 384  # Decoder width.
    decoder_depth: int = 4  # Decoder blocks.
    decoder_num_heads: int = 6  # Attention heads in the decoder.
    mlp_ratio: float = 4.0  # Hidden width of an MLP over the width of its block.
    norm_eps: float = 1e-6  # Epsilon of the layer norms; weights of --init-from that state another bring it along.
    # Attention kernel. xformers and cudnn need CUDA. auto uses xformers on CUDA and torch's
    # scaled_dot_product_attention (sdpa) on a CPU.
    attention: Literal["auto", "xformers", "cudnn", "sdpa"] = "auto"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"--model.{name.replace('_', '-')} must be at least 1, got {value}")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"--model.norm-eps must lie strictly between 0 and 1, got {self.norm_eps}")
        if not 1 <= min(self.width, self.decoder_width) * self.mlp_ratio < math.inf:
            raise ValueError(
                f"--model.mlp-ratio must leave an MLP at least one hidden unit, got {self.mlp_ratio} of --model.width "
                f"{self.width} and --model.decoder-width {self.decoder_width}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                "--model.image-size must be a multiple of --model.patch-size, "
                f"got {self.image_size} and {self.patch_size}"
            )
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                "--model.num-frames must be a multiple of --model.tubelet-size, "
                f"got {self.num_frames} and {self.tubelet_size}"
            )
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}width"), getattr(self, f"{prefix}num_heads")
            if width % heads:
                flags = prefix.replace("_", "-")
                raise ValueError(
                    f"--model.{flags}width must be a multiple of --model.{flags}num-heads, got {width} and {heads}"
                )

    @property
    def num_slots(self) -> int:
        return self.num_frames // self.tubelet_size

    @property
    def patches_per_slot(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        return self.num_slots * self.patches_per_slot

    @property
    def values_per_token(self) -> int:
        return self.tubelet_size * self.patch_size**2 * 3
