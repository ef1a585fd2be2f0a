"""Weights to and from Hugging Face's VideoMAE format: a folder with config.json and model.safetensors.

Read with `transformers.VideoMAEForPreTraining.from_pretrained(folder)`. Published checkpoints differ by release in how
they name the query and value biases and in the file they come in; all are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tgmae.model.config import ModelConfig
from tgmae.model.videomae import VideoMAE

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


def export_hf(model: VideoMAE, folder: Path) -> None:
    """Write the model as `folder`/config.json and `folder`/model.safetensors."""
    config, ours = model.config, model.state_dict()
    theirs = {hf_name: ours[name] for name, hf_name in _TOP.items()}
    kernel = (config.tubelet_size, config.patch_size, config.patch_size, 3)
    theirs[_CONV] = ours["patch_embed.weight"].unflatten(1, kernel).permute(0, 4, 1, 2, 3)
    for block, hf_block in _blocks(config):
        for name, hf_name in _BLOCK.items():
            for kind in ("weight", "bias"):
                theirs[f"{hf_block}.{hf_name}.{kind}"] = ours[f"{block}.{name}.{kind}"]
        attention = f"{hf_block}.attention.attention"
        for part, weight in zip(("query", "key", "value"), ours[f"{block}.attention.qkv.weight"].chunk(3), strict=True):
            theirs[f"{attention}.{part}.weight"] = weight
        theirs[f"{attention}.query.bias"] = ours[f"{block}.attention.q_bias"]
        theirs[f"{attention}.value.bias"] = ours[f"{block}.attention.v_bias"]
    folder.mkdir(parents=True, exist_ok=True)
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in theirs.items()}
    save_file(cpu, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")


def import_hf(model: VideoMAE, folder: Path) -> None:
    """Load a checkpoint of that format into `model`.

    Raises FileNotFoundError where files are missing, ValueError where a file cannot be read, a shape differs (naming
    both) or a weight is missing.
    """
    theirs = _read_weights(folder)
    config = model.config
    _check_config(folder, config)
    ours = {name: _take(theirs, hf_name) for name, hf_name in _TOP.items()}
    ours["patch_embed.weight"] = _take(theirs, _CONV).permute(0, 2, 3, 4, 1).flatten(1)
    for block, hf_block in _blocks(config):
        for name, hf_name in _BLOCK.items():
            for kind in ("weight", "bias"):
                ours[f"{block}.{name}.{kind}"] = _take(theirs, f"{hf_block}.{hf_name}.{kind}")
        attention = f"{hf_block}.attention.attention"
        parts = [_take(theirs, f"{attention}.{part}.weight") for part in ("query", "key", "value")]
        ours[f"{block}.attention.qkv.weight"] = torch.cat(parts)
        for letter, part in (("q", "query"), ("v", "value")):
            ours[f"{block}.attention.{letter}_bias"] = _take(
                theirs, f"{attention}.{part}.bias", f"{attention}.{letter}_bias"
            )
    check_shapes(model.state_dict(), ours, str(folder))
    model.load_state_dict(ours)


def check_shapes(expected: dict[str, Tensor], got: dict[str, Tensor], source: str) -> None:
    """Raise ValueError, naming both shapes, where two sets of weights do not match."""
    missing, extra = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{source} holds another network: missing {missing[:3]}, not expected {extra[:3]}")
    for name, tensor in expected.items():
        if tensor.shape != got[name].shape:
            raise ValueError(
                f"{source} is of another shape: {name} is {list(got[name].shape)} there, "
                f"{list(tensor.shape)} in this configuration"
            )


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of the Hugging Face model that computes the same."""
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
    encoder = [(f"encoder.{i}", f"videomae.encoder.layer.{i}") for i in range(config.depth)]
    return encoder + [(f"decoder.{i}", f"decoder.decoder_layers.{i}") for i in range(config.decoder_depth)]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            weights: dict[str, Tensor] = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
        except Exception as error:  # each format has exceptions of its own for a file that is cut off
            raise ValueError(f"{path} is no readable weights file: {error}") from error
        return weights
    raise FileNotFoundError(f"expected model.safetensors or pytorch_model.bin in {folder}")


def _check_config(folder: Path, config: ModelConfig) -> None:
    """Compare what the weights' shapes cannot show: depth, heads and geometry."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected config.json in {folder}")
    theirs = json.loads(path.read_text())
    for name, ours in hf_config(config).items():
        # A list means height and width; both must agree. bool is an int: flags are compared too.
        compared = isinstance(ours, int) or name == "hidden_act"
        if compared and theirs.get(name, ours) not in (ours, [ours, ours]):
            raise ValueError(
                f"{folder} is of another shape: {name} is {theirs[name]} there, {ours} in this configuration"
            )


def _take(weights: dict[str, Tensor], *names: str) -> Tensor:
    for name in names:
        if name in weights:
            return weights[name]
    raise ValueError(f"the checkpoint has no weight {' or '.join(names)}; is it a VideoMAEForPreTraining checkpoint?")
