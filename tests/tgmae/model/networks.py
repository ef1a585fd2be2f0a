"""Small networks, ours and Hugging Face's, their inputs, and a comparison of what they compute.

Dimensions: B clips, T frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from dali_pipelines.types import ClipRequest, CropBox
from kernels.gather_tokens import MEAN, STD
from tests.support.videos import clip_batch
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.masks.noise_scorer import NoiseScorer
from tgmae.masks.select import select_masks
from tgmae.model.initial_weights import InitialWeights, read_initial_weights
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import VideoMAE

SMALL = ModelConfig(
    image_size=48, num_frames=4, width=32, depth=3, num_heads=4, decoder_width=24, decoder_depth=2, decoder_num_heads=2
)
# Another patch, tubelet, MLP and norm.
OTHER = replace(SMALL, patch_size=8, num_frames=6, tubelet_size=3, mlp_ratio=2.0, norm_eps=1e-12, depth=1)


def import_hf(model: VideoMAE, source: Path) -> InitialWeights:
    """Load what `source` names into `model`, whose layer norms keep their epsilon."""
    found = read_initial_weights(str(source), model.config)
    model.load_state_dict(found.weights, strict=False)
    return found


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Add noise to every parameter: initial biases are 0 and norms 1, which would hide a swapped name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def our_model(config: ModelConfig, seed: int) -> VideoMAE:
    torch.manual_seed(seed)
    model = VideoMAE(config)
    randomise(model, seed)
    return model


def hf_model(config: ModelConfig, seed: int) -> VideoMAEForPreTraining:
    """Make the model from Hugging Face's own configuration class, not from what `make_hf_config` writes."""
    torch.manual_seed(seed)
    model = VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_frames=config.num_frames,
            tubelet_size=config.tubelet_size,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=int(config.width * config.mlp_ratio),
            decoder_hidden_size=config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_num_heads,
            decoder_intermediate_size=int(config.decoder_width * config.mlp_ratio),
            layer_norm_eps=config.norm_eps,
            use_mean_pooling=False,
            attn_implementation="eager",
        )
    )
    randomise(model, seed)
    return model.eval()


def inputs(config: ModelConfig, kind: str, seed: int, batch: int = 3) -> tuple[Tensor, TokenMasks]:
    shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    crop = CropBox(x=0, y=0, width=1, height=1)
    requests = tuple(
        ClipRequest(row=0, epoch=0, position=i, frames=(0,), crop=crop, flip=False, caption=0, mask_seed=100 * seed + i)
        for i in range(batch)
    )
    mask = MaskConfig(kind=kind, ratio=0.7)  # type: ignore[arg-type]
    scorer = NoiseScorer(kind, config.num_slots, config.patches_per_slot, torch.device("cpu"))  # type: ignore[arg-type]
    return frames, select_masks(mask, config, scorer(clip_batch(frames, requests)))


def pixel_values(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise frames uint8 [B, T, H, W, 3] with ImageNet's statistics: [B, T, 3, H, W]."""
    mean, std = torch.tensor(MEAN, dtype=dtype), torch.tensor(STD, dtype=dtype)
    return ((frames.to(dtype) / 255 - mean) / std).permute(0, 1, 4, 2, 3)


def bool_masked_pos(config: ModelConfig, masks: TokenMasks) -> Tensor:
    empty = torch.zeros(len(masks.masked), config.num_tokens, dtype=torch.bool)
    return empty.scatter(1, masks.masked.long(), True)


def assert_near(ours: Tensor, theirs: Tensor, name: str, tolerance: float = 1e-5) -> None:
    """Check that the two are equal within `tolerance` of the largest value."""
    assert ours.shape == theirs.shape, name
    error, size = (ours - theirs).abs().max(), theirs.abs().max()
    assert error <= tolerance * size, f"{name}: {error:.2e} of {size:.2e}"


def to_published_names(weights: dict[str, Any]) -> dict[str, Any]:
    """Rename weights of transformers 5 as published checkpoints and transformers 4 have them."""
    for part in ("query", "value"):
        old = f"attention.attention.{part[0]}_bias"
        weights = {name.replace(f"attention.attention.{part}.bias", old): w for name, w in weights.items()}
    return weights


def assert_same_function(ours: VideoMAE, theirs: VideoMAEForPreTraining, kind: str, seed: int) -> None:
    """Compare encoder output, prediction and loss."""
    config, dtype = ours.config, ours.patch_embed.weight.dtype
    frames, masks = inputs(config, kind, seed)
    pixels, masked = pixel_values(frames, dtype), bool_masked_pos(config, masks)
    loss, prediction, _ = ours(frames, masks)
    expected = theirs(pixels, bool_masked_pos=masked)
    features = theirs.videomae(pixels, bool_masked_pos=masked).last_hidden_state
    assert_near(ours.encode(frames, masks.visible), features, "encoder output")
    assert_near(prediction, expected.logits, "prediction")
    assert_near(loss, expected.loss, "loss")
