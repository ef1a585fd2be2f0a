"""A CLIP as open_clip loads it, from files or by download."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import open_clip
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn
from tqdm import tqdm

from engines.clip_weights import find_weights
from engines.config import CLIPConfig
from engines.torch_files import first_line


@dataclass(frozen=True, kw_only=True)
class OpenCLIP:
    """A CLIP in evaluation mode, float32, on the CPU.

    tokenizer    texts → int64 [n, context_length]
    mean, std    pixel normalisation per channel, of values in 0 … 1
    """

    model: nn.Module
    tokenizer: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def visual(self) -> VisionTransformer:
        """The image encoder."""
        visual = self.model.visual
        assert isinstance(visual, VisionTransformer)
        return visual


def load_open_clip(config: CLIPConfig) -> OpenCLIP:
    """Load the CLIP that `config` names. Prints what had to be assumed about a file of weights.

    Raises ValueError if there is no such model or weights, if the weights cannot be downloaded, if the file is not a
    checkpoint of that model or would run code, or if the image encoder is not a ViT with a class token.
    """
    weights = find_weights(config)
    training = weights.training
    preprocessing = None if training is None else {"mean": training.mean, "std": training.std}
    try:
        # A TorchScript archive is not a pickle and cannot be loaded as "weights only".
        model = open_clip.create_model(
            weights.name, pretrained=weights.pretrained, weights_only=not weights.is_code, require_pretrained=True,
            force_preprocess_cfg=preprocessing,
        )  # fmt: skip
        tokenizer = open_clip.get_tokenizer(weights.name)
    except Exception as error:  # from KeyError to the errors of pickle, open_clip raises anything
        source = weights.pretrained or config.model
        raise ValueError(f"{source} is not a checkpoint of the CLIP {config.model}: {first_line(error)}") from error
    visual = getattr(model, "visual", None)
    if not (isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"):
        raise ValueError(
            f"expected a CLIP whose image encoder is a ViT with a class token, such as ViT-B-32; {config.model} has "
            f"{type(visual).__name__}"
        )
    if training is not None:
        _check_activation(config, training.quick_gelu, model)
    if weights.note:
        tqdm.write(f"tgmae: {weights.note}", file=sys.stderr)
    mean, std = tuple(visual.preprocess_cfg["mean"]), tuple(visual.preprocess_cfg["std"])
    model.eval().requires_grad_(False)
    return OpenCLIP(model=model, tokenizer=tokenizer, mean=mean, std=std)


def _check_activation(config: CLIPConfig, quick_gelu: bool, model: nn.Module) -> None:
    """Raise ValueError if the model computes another activation than its weights were trained with."""
    if quick_gelu == any(isinstance(part, QuickGELU) for part in model.modules()):
        return
    other = config.model.removesuffix("-quickgelu") if not quick_gelu else f"{config.model}-quickgelu"
    uses = ("which {} does not use" if quick_gelu else "and {} uses QuickGELU").format(config.model)
    raise ValueError(
        f"the weights {config.weights} were trained with {'QuickGELU' if quick_gelu else 'GELU'}, {uses}; use "
        f"--clip.model {other}"
    )
