"""Read and write weights in Hugging Face's VideoMAE format: a folder with config.json and model.safetensors.

`transformers.VideoMAEForPreTraining.from_pretrained(folder)` reads what `export_hf` writes. Published checkpoints
differ by release in the names of the query and value biases and in the file that holds the weights. `import_hf` reads
all of them.

Dimensions: D width; a token's P values are (t p q c): frame, row, column, channel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.files import replacing_folder
from engines.torch_files import DamagedFile, read_torch_file
from tgmae.config.model import ModelConfig
from tgmae.model.videomae import VideoMAE
from tgmae.model.weights import check_shapes, digest_weights

_WEIGHTS = "model.safetensors"

# Our names → theirs: inside a block, and at the top level.
_BLOCK = {
    "norm1": "layernorm_before",
    "attention.out": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.0": "intermediate.dense",
    "mlp.2": "output.dense",
}
_TOP = {
    "encoder_norm.weight": "videomae.layernorm.weight",
    "encoder_norm.bias": "videomae.layernorm.bias",
    "to_decoder.weight": "encoder_to_decoder.weight",
    "mask_token": "mask_token",
    "decoder_norm.weight": "decoder.norm.weight",
    "decoder_norm.bias": "decoder.norm.bias",
    "head.weight": "decoder.head.weight",
    "head.bias": "decoder.head.bias",
    "patch_embed.bias": "videomae.embeddings.patch_embeddings.projection.bias",
}
_CONV = "videomae.embeddings.patch_embeddings.projection.weight"

# The entries of config.json that follow from a flag.
_FLAGS = {
    "image_size": "--model.image-size",
    "patch_size": "--model.patch-size",
    "num_frames": "--model.num-frames",
    "tubelet_size": "--model.tubelet-size",
    "hidden_size": "--model.width",
    "num_hidden_layers": "--model.depth",
    "num_attention_heads": "--model.num-heads",
    "intermediate_size": "--model.mlp-ratio",
    "decoder_hidden_size": "--model.decoder-width",
    "decoder_num_hidden_layers": "--model.decoder-depth",
    "decoder_num_attention_heads": "--model.decoder-num-heads",
    "decoder_intermediate_size": "--model.mlp-ratio",
}


def export_hf(model: VideoMAE, folder: Path, step: int | None = None) -> None:
    """Write the model as `folder`/model.safetensors and `folder`/config.json, in place of an older export.

    step   optimiser steps done, for `read_step`

    The folder is complete or not there. Raises OSError.
    """
    config, ours = model.config, model.state_dict()
    theirs = {hf_name: ours[name] for name, hf_name in _TOP.items()}
    # Their patch embedding is a convolution over channels, frames, rows and columns.
    theirs[_CONV] = rearrange(
        ours["patch_embed.weight"], "d (t p q c) -> d c t p q", t=config.tubelet_size, p=config.patch_size, c=3
    )
    for block, hf_block in _blocks(config):
        for name, hf_name in _BLOCK.items():
            for kind in ("weight", "bias"):
                theirs[f"{hf_block}.{hf_name}.{kind}"] = ours[f"{block}.{name}.{kind}"]
        attention = f"{hf_block}.attention.attention"
        for part, weight in zip(("query", "key", "value"), ours[f"{block}.attention.qkv.weight"].chunk(3), strict=True):
            theirs[f"{attention}.{part}.weight"] = weight
        theirs[f"{attention}.query.bias"] = ours[f"{block}.attention.q_bias"]
        theirs[f"{attention}.value.bias"] = ours[f"{block}.attention.v_bias"]
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in theirs.items()}
    metadata = {"format": "pt", "digest": digest_weights(cpu)} | ({} if step is None else {"step": str(step)})
    with replacing_folder(folder) as new:
        try:
            save_file(cpu, new / _WEIGHTS, metadata)
        except SafetensorError as error:  # so it reports a full disk
            raise OSError(f"could not write {folder / _WEIGHTS}: {error}") from error
        (new / "config.json").write_text(json.dumps(make_hf_config(config), indent=2) + "\n")


def read_step(folder: Path) -> int | None:
    """Return the optimiser steps that an export has done, or None where there is no export that says so."""
    try:
        step = _read_metadata(folder / _WEIGHTS).get("step", "")
    except (OSError, SafetensorError):
        return None
    return int(step) if step.isdecimal() and (folder / "config.json").is_file() else None


def import_hf(model: VideoMAE, folder: Path) -> None:
    """Load the checkpoint in `folder` into `model`.

    Raises FileNotFoundError if a file is missing, and ValueError if a file cannot be read, a weight is missing, or a
    shape differs (the message names both).
    """
    theirs = _read_weights(folder)
    config = model.config
    _check_config(folder / "config.json", config)

    def take(*names: str) -> Tensor:
        """Return the weight of the first name that exists."""
        for name in names:
            if name in theirs:
                return theirs[name]
        raise ValueError(f"{folder} has no weight {' or '.join(names)}; expected a VideoMAEForPreTraining checkpoint")

    ours = {name: take(hf_name) for name, hf_name in _TOP.items()}
    ours["patch_embed.weight"] = rearrange(take(_CONV), "d c t p q -> d (t p q c)")
    for block, hf_block in _blocks(config):
        for name, hf_name in _BLOCK.items():
            for kind in ("weight", "bias"):
                ours[f"{block}.{name}.{kind}"] = take(f"{hf_block}.{hf_name}.{kind}")
        attention = f"{hf_block}.attention.attention"
        parts = [take(f"{attention}.{part}.weight") for part in ("query", "key", "value")]
        ours[f"{block}.attention.qkv.weight"] = torch.cat(parts)
        # The second name is the one published before 2025.
        for letter, part in (("q", "query"), ("v", "value")):
            ours[f"{block}.attention.{letter}_bias"] = take(f"{attention}.{part}.bias", f"{attention}.{letter}_bias")
    check_shapes(model.state_dict(), ours, str(folder))
    model.load_state_dict(ours)


def make_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of the Hugging Face model that computes the same function."""
    return {
        "architectures": ["VideoMAEForPreTraining"],
        "model_type": "videomae",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "num_frames": config.num_frames,
        "tubelet_size": config.tubelet_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "decoder_hidden_size": config.decoder_width,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_num_heads,
        "decoder_intermediate_size": int(config.decoder_width * config.mlp_ratio),
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "qv_bias": True,
        "use_mean_pooling": False,  # the pretraining encoder ends in a norm
        "norm_pix_loss": True,
    }


def _blocks(config: ModelConfig) -> list[tuple[str, str]]:
    """List our name and their name of every block."""
    encoder = [(f"encoder.{i}", f"videomae.encoder.layer.{i}") for i in range(config.depth)]
    return encoder + [(f"decoder.{i}", f"decoder.decoder_layers.{i}") for i in range(config.decoder_depth)]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (path := folder / _WEIGHTS).is_file():
        try:
            weights, metadata = load_file(path), _read_metadata(path)
        except Exception as error:  # safetensors raises exceptions of its own
            raise DamagedFile(f"cannot read weights from {path}: {error}") from error
        if "digest" in metadata and metadata["digest"] != digest_weights(weights):  # others' files have none
            raise DamagedFile(f"cannot read weights from {path}: they are damaged (wrong checksum)")
        return weights
    if (path := folder / "pytorch_model.bin").is_file():
        found = read_torch_file(path, f"cannot read weights from {path}")
        if not isinstance(found, dict):
            raise ValueError(f"cannot read weights from {path}: expected a dictionary, got {type(found).__name__}")
        return found
    raise FileNotFoundError(f"expected model.safetensors or pytorch_model.bin in {folder}")


def _read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        return metadata


def _check_config(path: Path, config: ModelConfig) -> None:
    """Compare depth, heads and geometry, which the shapes of the weights cannot show."""
    if not path.is_file():
        raise FileNotFoundError(f"expected config.json in {path.parent}")
    try:
        theirs = json.loads(path.read_text())
    except ValueError as error:
        raise DamagedFile(f"{path} is not a readable configuration: {error}") from error
    if not isinstance(theirs, dict):
        raise DamagedFile(f"{path} is not a readable configuration: expected a JSON object, got {json.dumps(theirs)}")
    for name, ours in make_hf_config(config).items():
        # A list means height and width: both must agree. bool is an int, so flags are compared too. The norms' epsilon
        # is not: the published files hold the default of the class, not that of VideoMAE's own code.
        compared = isinstance(ours, int) or name == "hidden_act"
        if compared and theirs.get(name, ours) not in (ours, [ours, ours]):
            flag = f" ({_FLAGS[name]})" if name in _FLAGS else ""
            raise ValueError(
                f"{path} is of a different model: {name} is {theirs[name]} there, {ours} in this configuration{flag}"
            )
