"""The names of the parameters: ours, Hugging Face's, and those of VideoMAE's own code, with conversions both ways.

Our state dict is in the middle: `to_hugging_face` writes one as published checkpoints have it, and `to_ours` reads any
of the namings. Tables hold modules; the parameters of a module (weight, bias, q_bias, …) keep their names.

Dimensions: D width; a token's P values are (t p q c): frame, row, column, channel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from tgmae.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Naming:
    """The modules of one code base: theirs by ours, whole blocks and inside a block."""

    title: str
    blocks: dict[str, str]
    inside: dict[str, str]
    outside: dict[str, str]

    def name(self, ours: str) -> str:
        """Return their name of our parameter."""
        if match := re.fullmatch(r"(encoder|decoder)\.(\d+)\.(.+)", ours):
            stack, number, rest = match.groups()
            return f"{self.blocks[stack]}.{number}.{_rename_module(rest, self.inside)}"
        return _rename_module(ours, self.outside)


HUGGING_FACE = Naming(
    title="Hugging Face's",
    blocks={"encoder": "videomae.encoder.layer", "decoder": "decoder.decoder_layers"},
    inside={
        "norm1": "layernorm_before",
        "attention": "attention.attention",
        "attention.qkv": "attention.attention.qkv",  # in one piece only while it is converted
        "attention.out": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.0": "intermediate.dense",
        "mlp.2": "output.dense",
    },
    outside={
        "patch_embed": "videomae.embeddings.patch_embeddings.projection",
        "encoder_norm": "videomae.layernorm",
        "to_decoder": "encoder_to_decoder",
        "decoder_norm": "decoder.norm",
        "head": "decoder.head",
    },
)
VIDEOMAE = Naming(
    title="VideoMAE's own",
    blocks={"encoder": "encoder.blocks", "decoder": "decoder.blocks"},
    inside={
        "attention": "attn",
        "attention.qkv": "attn.qkv",
        "attention.out": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
    },
    outside={
        "patch_embed": "encoder.patch_embed.proj",
        "encoder_norm": "encoder.norm",
        "to_decoder": "encoder_to_decoder",
        "decoder_norm": "decoder.norm",
        "head": "decoder.head",
    },
)
OURS = Naming(title="tgmae's", blocks={"encoder": "encoder", "decoder": "decoder"}, inside={}, outside={})

# What the first weight of a network is called: the naming, and what an encoder without a decoder leaves out in front.
_FIRST_WEIGHTS = {
    "patch_embed.weight": (OURS, ""),
    "videomae.embeddings.patch_embeddings.projection.weight": (HUGGING_FACE, ""),
    "embeddings.patch_embeddings.projection.weight": (HUGGING_FACE, "videomae."),
    "encoder.patch_embed.proj.weight": (VIDEOMAE, ""),
    "patch_embed.proj.weight": (VIDEOMAE, "encoder."),
}
_QKV = ("query", "key", "value")
# What DDP, torch.compile, Lightning and others put in front of every name.
_WRAPPERS = re.compile(r"^((module|_orig_mod|model|backbone)\.)+")


def _rename_module(name: str, table: dict[str, str]) -> str:
    module, dot, parameter = name.rpartition(".")
    return f"{table.get(module, module)}{dot}{parameter}"


def recognise(weights: dict[str, Tensor]) -> tuple[Naming, dict[str, Tensor]]:
    """Return the naming of a state dict, and its weights by the full names.

    What wrappers put in front ("module.") is dropped, and what an encoder leaves out is put back. Query and value
    biases get the names of published checkpoints; transformers 5 and old exports of ours call them query.bias and
    value.bias.

    Raises ValueError if it is not a VideoMAE.
    """
    wrapped, weights = weights, {_WRAPPERS.sub("", name): weight for name, weight in weights.items()}
    if len(weights) < len(wrapped):
        raise ValueError(f"it holds several networks, as {[*wrapped][:3]} show; save the weights of one alone")
    first = next((name for name in _FIRST_WEIGHTS if name in weights), None)
    if first is None:
        raise ValueError(f"it is not a VideoMAE: expected a weight {' or '.join(_FIRST_WEIGHTS)}, got {[*weights][:3]}")
    naming, left_out = _FIRST_WEIGHTS[first]
    if naming is HUGGING_FACE:
        for old, published in (("query.bias", "q_bias"), ("value.bias", "v_bias")):
            weights = {
                name.replace(f".attention.attention.{old}", f".attention.attention.{published}"): weight
                for name, weight in weights.items()
            }
    return naming, {left_out + name: weight for name, weight in weights.items()}


def to_ours(weights: dict[str, Tensor], naming: Naming, expected: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Return those of `weights` that our parameters `expected` stand for, by our names, and the names of the others.

    Raises ValueError for a patch embedding or queries, keys and values that are not a VideoMAE's.
    """
    theirs = dict(weights)
    if naming is HUGGING_FACE:
        for first in [name for name in theirs if name.endswith(".attention.attention.query.weight")]:
            block = first.removesuffix("query.weight")
            parts = [f"{block}{part}.weight" for part in _QKV]
            if all(part in theirs for part in parts):
                shapes = [list(theirs[part].shape) for part in parts]
                if len(shapes[0]) != 2 or shapes != [shapes[0]] * 3:
                    raise ValueError(f"expected matrices of one size for query, key and value in {block}, got {shapes}")
                theirs[f"{block}qkv.weight"] = torch.cat([theirs.pop(part) for part in parts])
    ours = {name: theirs.pop(found) for name in expected if (found := naming.name(name)) in theirs}
    if naming is not OURS:
        kernel = ours["patch_embed.weight"]
        if kernel.dim() != 5 or kernel.shape[1] != 3:
            raise ValueError(
                f"expected a patch embedding [width, 3, frames, rows, columns], got {list(kernel.shape)}; is it a "
                "model of images?"
            )
        # Their patch embedding is a convolution over channels, frames, rows and columns.
        ours["patch_embed.weight"] = rearrange(kernel, "d c t p q -> d (t p q c)")
    return ours, list(theirs)


def to_hugging_face(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return all of our weights as transformers' VideoMAEForPreTraining has them.

    The biases are called q_bias and v_bias, as in published checkpoints: transformers 4 knows no other names, and 5
    renames them.
    """
    theirs = {HUGGING_FACE.name(name): weight for name, weight in ours.items()}
    kernel = HUGGING_FACE.name("patch_embed.weight")
    theirs[kernel] = rearrange(
        theirs[kernel], "d (t p q c) -> d c t p q", t=config.tubelet_size, p=config.patch_size, c=3
    )
    for packed in [name for name in theirs if name.endswith(".qkv.weight")]:
        parts = theirs.pop(packed).chunk(3)
        theirs |= {packed.replace("qkv", part): weight for part, weight in zip(_QKV, parts, strict=True)}
    return theirs
