"""Export weights in Hugging Face's VideoMAE format: a folder that transformers reads.

`VideoMAEForPreTraining.from_pretrained(folder)` computes what our network computes, in every supported release of
transformers; `VideoMAEImageProcessor.from_pretrained(folder)` makes its input from frames.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engines.files import replacing_folder
from kernels.gather_tokens import MEAN, STD
from tgmae.config.model import ModelConfig
from tgmae.model.naming import to_hugging_face
from tgmae.model.videomae import VideoMAE
from tgmae.model.weight_files import read_metadata
from tgmae.model.weights import digest_weights

_WEIGHTS = "model.safetensors"

# The entries of config.json that follow from a flag.
FLAGS = {
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


def export_hf(
    model: VideoMAE, folder: Path, step: int | None = None, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the model to `folder`, in place of an older export: weights, config.json and preprocessor_config.json.

    step      optimiser steps done, for `read_step`
    weights   those of the model, where processes share it and it has only a part of them

    The folder is complete or not there. Raises OSError.
    """
    weights = to_hugging_face(dict(model.state_dict() if weights is None else weights), model.config)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    metadata = {"format": "pt", "digest": digest_weights(weights)} | ({} if step is None else {"step": str(step)})
    files = {"config.json": make_hf_config(model.config), "preprocessor_config.json": make_processor(model.config)}
    with replacing_folder(folder) as new:
        try:
            save_file(weights, new / _WEIGHTS, metadata)
        except SafetensorError as error:  # so it reports a full disk
            raise OSError(f"could not write {folder / _WEIGHTS}: {error}") from error
        for name, content in files.items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n")


def read_step(folder: Path) -> int | None:
    """Return the optimiser steps that an export has done, or None where there is no export that says so."""
    try:
        step = read_metadata(folder / _WEIGHTS).get("step", "")
    except (OSError, SafetensorError):
        return None
    return int(step) if step.isdecimal() and (folder / "config.json").is_file() else None


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
        # The encoder ends in a norm of tokens. With True, transformers leaves that norm out of every class.
        "use_mean_pooling": False,
        "norm_pix_loss": True,
    }


def make_processor(config: ModelConfig) -> dict[str, Any]:
    """Return the preprocessor_config.json that normalises frames as training does, and crops them to its size."""
    size = config.image_size
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 2,  # PIL's bilinear
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
