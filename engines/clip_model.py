"""Load a CLIP with open_clip, from files or by download, and encode captions with it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from engines.clip_weights import find_weights
from engines.config import SHAPES_CLIP as SHAPES_CLIP
from engines.config import CLIPConfig
from engines.torch_files import first_line


@dataclass(frozen=True, kw_only=True)
class CLIPModel:
    """A CLIP in evaluation mode, float32, on the CPU.

    tokenizer    texts → int64 [n, context_length]
    mean, std    pixel normalisation per channel, of values in 0 … 1
    fingerprint  hash of everything that scores and embeddings depend on: weights, architecture and normalisation
    is_demos     the tiny CLIP that knows nothing but the demo's shapes
    """

    model: nn.Module
    tokenizer: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    is_demos: bool = False

    @property
    def visual(self) -> VisionTransformer:
        """The image encoder."""
        visual = self.model.visual
        assert isinstance(visual, VisionTransformer)
        return visual

    def too_long(self, captions: Sequence[str]) -> list[bool]:
        """Return which captions exceed the context, so that the tokenizer cuts them off."""
        length = self.tokenizer.context_length
        own = getattr(self.tokenizer, "tokenizer", None)  # Hugging Face's tokenizer, which pads with its own token
        padding = getattr(own, "pad_token_id", 0)
        found: list[bool] = []
        for start in range(0, len(captions), 1024):
            tokens = self.tokenizer(list(captions[start : start + 1024]), context_length=length + 1)
            found += (tokens[:, -1] != padding).tolist()
        return found

    def encode_text(self, captions: Sequence[str], device: torch.device, batch: int = 256) -> Tensor:
        """Encode captions on `device` → L2-normalised embeddings float32 [C, E] on the CPU.

        Shows a progress bar from four batches on.
        """
        model = self.model.to(device)
        parts = []
        try:
            starts = range(0, len(captions), batch)
            for start in tqdm(starts, desc="encoding captions", unit="batch", disable=len(starts) < 4):
                tokens = self.tokenizer(list(captions[start : start + batch])).to(device)
                with torch.inference_mode():
                    parts.append(model.encode_text(tokens, normalize=True).float().cpu())  # type: ignore[operator]  # nn.Module's attributes are untyped
        finally:
            model.cpu()
        return torch.cat(parts)


def load_clip(config: CLIPConfig) -> CLIPModel:
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
    return CLIPModel(
        model=model, tokenizer=tokenizer, mean=mean, std=std,
        fingerprint=fingerprint(model.state_dict(), name=f"{mean} {std} {describe_network(model)}"),
        is_demos=config.is_demos,
    )  # fmt: skip


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


def fingerprint(state: dict[str, Tensor], name: str) -> str:
    """Return 16 hexadecimal digits that change with any weight and with `name`."""
    digest = hashlib.sha256(name.encode())
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def describe_network(module: nn.Module) -> str:
    """Return what the weights do not tell, such as the activation (OpenAI's need QuickGELU) and the number of heads."""
    heads = [part.num_heads for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    return f"{module} {heads}"
