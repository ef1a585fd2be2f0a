"""A CLIP: its image encoder, and the embeddings of captions.

open_clip loads it. Where a folder holds the usual kind, the image encoder is read without open_clip, which is then
imported only for captions that are not in the cache and for the fingerprint: the import takes longer than torch's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engines.config import SHAPES_CLIP as SHAPES_CLIP
from engines.config import CLIPConfig
from engines.progress import progress_bar
from engines.towers.image_encoder import Encoder, read_image_encoder

if TYPE_CHECKING:
    from engines.open_clip_model import OpenCLIP


@dataclass(frozen=True, kw_only=True)
class CLIPModel:
    """A CLIP in evaluation mode, float32, on the CPU.

    visual       the image encoder
    mean, std    pixel normalisation per channel, of values in 0 … 1
    load         loads all of it with open_clip
    files        digest of the files that say all about it; "" where there are none
    is_demos     the tiny CLIP that knows nothing but the demo's shapes
    """

    visual: Encoder
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    load: Callable[[], OpenCLIP]
    files: str = ""
    is_demos: bool = False

    @cached_property
    def open_clip(self) -> OpenCLIP:
        """All of it, loaded when it is first asked for."""
        return self.load()

    @property
    def model(self) -> nn.Module:
        """Image and text encoder."""
        return self.open_clip.model

    @property
    def tokenizer(self) -> Any:
        """Maps texts → int64 [n, context_length]."""
        return self.open_clip.tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that scores and embeddings depend on: weights, architecture and normalisation."""
        about = f"{self.mean} {self.std} {describe_network(self.model)}"
        return fingerprint(self.model.state_dict(), name=about)

    @property
    def captions_key(self) -> str:
        """A name for the embeddings of captions, which changes with everything that they depend on."""
        return self.files or self.fingerprint

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
            for start in progress_bar(starts, desc="encoding captions", unit="batch", disable=len(starts) < 4):
                tokens = self.tokenizer(list(captions[start : start + batch])).to(device)
                with torch.inference_mode():
                    parts.append(model.encode_text(tokens, normalize=True).float().cpu())  # type: ignore[operator]  # nn.Module's attributes are untyped
        finally:
            model.cpu()
        return torch.cat(parts)

    @classmethod
    def of(cls, loaded: OpenCLIP, is_demos: bool = False) -> CLIPModel:
        """Return what open_clip has loaded."""
        return cls(visual=loaded.visual, mean=loaded.mean, std=loaded.std, load=lambda: loaded, is_demos=is_demos)


def load_clip(config: CLIPConfig) -> CLIPModel:
    """Load the CLIP that `config` names; where its image encoder can be read from a folder, only that.

    Prints what had to be assumed about a file of weights. Raises ValueError as `load_open_clip` does.
    """

    def load() -> OpenCLIP:
        from engines.open_clip_model import load_open_clip  # and open_clip

        return load_open_clip(config)

    read = read_image_encoder(config.folder) if config.folder is not None else None
    if read is None:
        return CLIPModel.of(load(), config.is_demos)
    visual, mean, std = read
    files = hashlib.sha256(config.identity().encode()).hexdigest()[:16]
    return CLIPModel(visual=visual, mean=mean, std=std, load=load, files=files, is_demos=config.is_demos)


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
