"""Load a CLIP with open_clip, from files or by download, and encode captions with it."""

from __future__ import annotations

import difflib
import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from engines.config import SHAPES_CLIP, CLIPConfig


@dataclass(frozen=True, kw_only=True)
class CLIPModel:
    """A CLIP in evaluation mode, float32, on the CPU.

    tokenizer    texts → int64 [n, context_length]
    mean, std    pixel normalisation per channel, of values in 0 … 1
    fingerprint  hash of everything that scores and embeddings depend on: weights, architecture and normalisation
    """

    model: nn.Module
    tokenizer: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str

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
    """Load the CLIP that `config` names.

    Raises ValueError if there is no such model or weights, if the weights cannot be downloaded, if the file is not a
    checkpoint of that model, or if the image encoder is not a ViT with a class token.
    """
    folder = SHAPES_CLIP if config.model == "shapes" else Path(config.model)
    if folder.is_dir():
        name, weights = f"local-dir:{folder}", None
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise ValueError(f"{folder} holds no weights (expected open_clip_model.safetensors, as open_clip saves it)")
    else:
        name, weights = config.model, _check_weights(config)
    try:
        # OpenAI's weights are TorchScript archives, which are not pickles and cannot be loaded as "weights only".
        only = weights is None or not _is_torchscript(weights)
        model = open_clip.create_model(name, pretrained=weights, weights_only=only)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # from KeyError to the errors of pickle, open_clip raises anything
        raise ValueError(_describe_failure(config, weights, error)) from error
    visual = getattr(model, "visual", None)
    if not (isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"):
        raise ValueError(
            f"expected a CLIP whose image encoder is a ViT with a class token, such as ViT-B-32; {config.model} has "
            f"{type(visual).__name__}"
        )
    if _needs_quick_gelu(config, weights) and not any(isinstance(part, QuickGELU) for part in model.modules()):
        raise ValueError(
            f"the weights {config.weights} were trained with QuickGELU, which {config.model} does not use; use "
            f"--clip.model {config.model}-quickgelu"
        )
    preprocessing = visual.preprocess_cfg
    mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
    model.eval().requires_grad_(False)
    return CLIPModel(
        model=model, tokenizer=tokenizer, mean=mean, std=std,
        fingerprint=fingerprint(model.state_dict(), name=f"{mean} {std} {describe_network(model)}"),
    )  # fmt: skip


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


def _needs_quick_gelu(config: CLIPConfig, weights: str | None) -> bool:
    """Return whether the weights were trained with QuickGELU.

    open_clip's list says so for its tags. A file counts if it is a TorchScript archive, the format of OpenAI's own.
    """
    if weights is None:
        return False
    if Path(weights).is_file():
        return _is_torchscript(weights)
    return bool((open_clip.get_pretrained_cfg(config.model, weights) or {}).get("quick_gelu"))


def _is_torchscript(path: str) -> bool:
    """Look for the entry by which torch.load itself recognises an archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())


def _check_weights(config: CLIPConfig) -> str:
    """Return the tag or file of the weights. Raises ValueError for names that open_clip does not know."""
    models = open_clip.list_models()
    if config.model not in models:
        near = difflib.get_close_matches(config.model, models, n=3, cutoff=0.5)
        raise ValueError(
            f"open_clip has no model {config.model!r}{f'; did you mean {chr(32).join(near)}?' if near else ''} "
            "(--clip.model is an open_clip name, a folder saved by open_clip, or shapes, the demo's tiny CLIP)"
        )
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    if config.weights not in tags and not Path(config.weights).is_file():
        raise ValueError(
            f"no weights {config.weights!r} for {config.model}: --clip.weights is neither a file nor one of "
            f"open_clip's tags ({', '.join(tags)})"
        )
    return config.weights


def _describe_failure(config: CLIPConfig, weights: str | None, error: Exception) -> str:
    if weights is None or Path(weights).is_file():
        source = config.model if weights is None else weights
        return f"{source} is not a checkpoint of the CLIP {config.model}: {_first_line(error)}"
    return (
        f"the weights {weights!r} of {config.model} could not be downloaded: {_first_line(error)}. "
        "Without a network, use a file: --clip.weights FILE (an open_clip or OpenAI checkpoint, .pt or .safetensors), "
        "or a folder saved by open_clip: --clip.model FOLDER"
    )


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, without torch's advice to turn its safety check off."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "Weights only load failed" in text:
        return "it is not a file of weights"
    return text if len(text) <= 300 else f"{text[:300]} …"
