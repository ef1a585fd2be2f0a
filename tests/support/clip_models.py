"""CLIPs with random weights for tests: small ones, also as folders that open_clip can load, and ViT-B/32."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def small_config(**vision: Any) -> dict[str, Any]:
    """Return open_clip's configuration of a CLIP of about 0.9 M weights; `vision` changes its image encoder."""
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8, **vision},
        # The size of the vocabulary of open_clip's tokenizer.
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }


def small_clip(seed: int = 0, quick_gelu: bool = True, **vision: Any) -> nn.Module:
    """Make a small CLIP. All weights are random, including biases and norms, so that an omitted term shows."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**small_config(**vision), quick_gelu=quick_gelu).eval().requires_grad_(False)
    return randomize(model)


def randomize(model: nn.Module) -> nn.Module:
    """Add noise to every weight, in place."""
    for name, weight in model.named_parameters():
        scale = 0.5 if weight.dim() == 1 else 0.1
        if "positional" in name or "class_embedding" in name:
            scale = 1.0
        weight.data.add_(scale * torch.randn_like(weight))
    return model


def save_small_clip(folder: Path, seed: int = 0, quick_gelu: bool = True, **vision: Any) -> nn.Module:
    """Write `small_clip(seed, …)` as a folder for open_clip and `--clip.model FOLDER`; return the model."""
    model = small_clip(seed, quick_gelu, **vision)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_cfg": {**small_config(**vision), "quick_gelu": quick_gelu},
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def cosine_error(a: Tensor, b: Tensor) -> float:
    """Return 1 − the smallest cosine between the rows of two tensors [..., E] of any precision."""
    return 1 - float(torch.cosine_similarity(a.detach().double(), b.detach().double(), dim=-1).min())


@functools.cache
def vit_b_32() -> nn.Module:
    """Make ViT-B/32 in its real size, with random weights. All tests share it: do not change it."""
    torch.manual_seed(0)
    return open_clip.create_model("ViT-B-32-quickgelu").eval().requires_grad_(False)
