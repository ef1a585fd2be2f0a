"""CLIP's image encoder, read from a folder without open_clip, whose import takes longer than torch's.

Only the usual kind is read: a ViT with a class token. Names of weights and modules are those of open_clip's
VisionTransformer, so towers are built from either.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import safe_open
from torch import nn

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

Encoder: TypeAlias = "VisionTransformer | ImageEncoder"
Normalisation: TypeAlias = tuple[float, float, float]  # of each channel

# What the configuration of a usual ViT says. Anything else may change what the network computes.
_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
_VISION_KEYS = {"image_size", "patch_size", "width", "head_width", "layers", "mlp_ratio"}


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the activation of OpenAI's weights. Towers compute it in another form (blocks.py)."""


class ResidualBlock(nn.Module):
    """The weights of one block."""

    def __init__(self, width: int, num_heads: int, hidden: int, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ls_1 = nn.Identity()
        self.ln_2 = nn.LayerNorm(width)
        activation = QuickGELU() if quick_gelu else nn.GELU()
        layers = {"c_fc": nn.Linear(width, hidden), "gelu": activation, "c_proj": nn.Linear(hidden, width)}
        self.mlp: Any = nn.Sequential(OrderedDict(layers))
        self.ls_2 = nn.Identity()


class ImageEncoder(nn.Module):
    """The weights of an image encoder, float32 on the CPU. It computes nothing: towers are built from it."""

    def __init__(
        self, *, image_size: int, patch_size: int, width: int, num_heads: int, hidden: int, num_layers: int,
        embed_dim: int, quick_gelu: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        side = image_size // patch_size
        self.image_size, self.grid_size = (image_size, image_size), (side, side)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(side**2 + 1, width))
        self.proj = nn.Parameter(torch.empty(width, embed_dim))
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        blocks = [ResidualBlock(width, num_heads, hidden, quick_gelu) for _ in range(num_layers)]
        self.transformer: Any = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_post = nn.LayerNorm(width)


def read_image_encoder(folder: Path) -> tuple[ImageEncoder, Normalisation, Normalisation] | None:
    """Read the image encoder of a CLIP that open_clip has saved in a folder, and the mean and deviation of its pixels.

    Returns None where only open_clip can read the folder, or say what is wrong with it: another kind of network, or a
    file that is missing or damaged or does not fit the other.
    """
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        model, preprocessing = config["model_cfg"], config["preprocess_cfg"]
        mean, std = _per_channel(*preprocessing["mean"]), _per_channel(*preprocessing["std"])
        if not _is_usual(model):
            return None
        with torch.device("meta"):  # the weights come from the file
            visual = _build(model["embed_dim"], bool(model.get("quick_gelu")), **model["vision_cfg"])
        with safe_open(folder / "open_clip_model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith("visual.")]  # noqa: SIM118 - not a mapping
            weights = {name.removeprefix("visual."): file.get_tensor(name).float() for name in names}
        visual.load_state_dict(weights, assign=True)
    except Exception:  # safetensors, JSON and torch raise many kinds; open_clip says what is wrong
        return None
    return visual.eval().requires_grad_(False), mean, std


def _per_channel(red: float, green: float, blue: float) -> Normalisation:
    return red, green, blue


def _is_usual(model: dict[str, Any]) -> bool:
    vision = model["vision_cfg"]
    sizes = (vision.get(name, 0) for name in ("image_size", "layers"))
    return set(model) <= _MODEL_KEYS and set(vision) <= _VISION_KEYS and all(isinstance(size, int) for size in sizes)


def _build(
    embed_dim: int, quick_gelu: bool, image_size: int = 224, patch_size: int = 16, width: int = 768,
    head_width: int = 64, layers: int = 12, mlp_ratio: float = 4.0,
) -> ImageEncoder:  # fmt: skip
    """Build an encoder from a configuration, with open_clip's defaults (`open_clip.CLIPVisionCfg`)."""
    return ImageEncoder(
        image_size=image_size, patch_size=patch_size, width=width, num_heads=width // head_width,
        hidden=int(width * mlp_ratio), num_layers=layers, embed_dim=embed_dim, quick_gelu=quick_gelu,
    )  # fmt: skip
