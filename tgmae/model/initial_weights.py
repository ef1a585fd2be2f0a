"""Weights to start a run from: what --init-from names, checked against the network and renamed to our parameters.

A pretraining checkpoint is taken whole; from an encoder alone, or a finetuned network, the encoder is taken. The notes
say what a file leaves open, and what was not taken from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.torch_files import DamagedFile
from tgmae.config.model import ModelConfig
from tgmae.model.huggingface import FLAGS, make_hf_config
from tgmae.model.naming import HUGGING_FACE, OURS, VIDEOMAE, Naming, recognise, to_ours
from tgmae.model.videomae import VideoMAE, sinusoid_table
from tgmae.model.weight_files import FoundWeights, find_weights
from tgmae.model.weights import check_shapes, check_values

_HF_NORM_EPS = 1e-12  # where config.json says nothing, transformers computes with this
_POSITIONS = ("position_embeddings", "pos_embed")
_CLASSIFIERS = ("classifier", "fc_norm", "encoder.head", "encoder.fc_norm")


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights by our names, on the CPU.

    weights   parameters that are not among them keep the values of a fresh network
    norm_eps  the epsilon of the layer norms that belongs to them; None where the file does not say it
    source    the file that says the epsilon, for messages
    notes     what was taken, what is fresh, what was left out and what was assumed
    """

    weights: dict[str, Tensor]
    norm_eps: float | None
    source: Path
    notes: list[str]


def read_initial_weights(source: str, config: ModelConfig) -> InitialWeights:
    """Read the weights that `source` names (see `find_weights`) for a network of this configuration.

    Raises FileNotFoundError or OSError where there are none, and ValueError where a file cannot be read, or holds the
    weights of a different network; the message names both values.
    """
    found = find_weights(source)
    with torch.device("meta"):
        expected = VideoMAE(config).state_dict()
    try:
        naming, theirs = recognise(found.weights)
        check_values(theirs)
        weights, others = to_ours(theirs, naming, [*expected])
    except ValueError as error:
        raise ValueError(f"{found.path} cannot be started from: {error}") from error
    has_decoder = not all(map(_is_encoder, weights))
    norm_eps, stated_in = _check_settings(found, naming, theirs, config, has_decoder)

    fresh = [name for name in expected if name not in weights]
    if not has_decoder:  # and finetuned encoders have no norm of tokens: theirs comes after the mean over them
        fresh = [name for name in fresh if _is_encoder(name) and not name.startswith("encoder_norm.")]
    if fresh:
        raise ValueError(
            f"{found.path} has no weight {_list(map(naming.name, fresh))}; give a whole pretraining checkpoint, or an "
            "encoder without any decoder"
        )
    left_out = _check_others(others, theirs, found.path, config)
    check_shapes({name: expected[name] for name in weights}, weights, str(found.path))
    notes = [_describe(source, found.path, naming, weights, left_out, has_decoder)]
    if naming is VIDEOMAE:
        notes.append(
            f"{found.path} does not say its heads, epsilon, frames and size; assuming "
            f"--model.num-heads {config.num_heads}"
            + (f", --model.decoder-num-heads {config.decoder_num_heads}" if has_decoder else "")
            + f", --model.norm-eps {config.norm_eps}, --model.num-frames {config.num_frames} and "
            f"--model.image-size {config.image_size}"
        )
    return InitialWeights(weights=weights, norm_eps=norm_eps, source=stated_in, notes=notes)


def _is_encoder(name: str) -> bool:
    """Return whether one of our parameters belongs to the encoder."""
    return name.startswith(("patch_embed.", "encoder.", "encoder_norm."))


def _list(names: Iterable[str]) -> str:
    first, *more = names
    return f"{first} and {len(more)} more" if more else first


def _describe(
    source: str, path: Path, naming: Naming, weights: dict[str, Tensor], left_out: list[str], has_decoder: bool
) -> str:
    """Say what a run starts from."""
    where = source if Path(source) == path else f"{source} ({path.name})"
    unused = f"; not used: {', '.join(left_out)}" if left_out else ""
    if has_decoder:
        return f"starting from all weights of {where}, with {naming.title} names{unused}"
    fresh = "the decoder is" if "encoder_norm.weight" in weights else "the decoder and the encoder's last norm are"
    return f"starting from the encoder of {where}, with {naming.title} names; {fresh} fresh{unused}"


# Is it the same network?


def _check_settings(
    found: FoundWeights, naming: Naming, theirs: dict[str, Tensor], config: ModelConfig, has_decoder: bool
) -> tuple[float | None, Path]:
    """Compare what is said about a network, or what shapes show, with `config`; return its epsilon and who says it."""
    if naming is HUGGING_FACE:
        path = found.path.parent / "config.json"
        said = _read_hf_config(path)
        # A list means height and width: both must agree. bool is an int, so flags are compared too.
        compared = {
            name: [value, value] if isinstance(said.get(name), list) else value
            for name, value in make_hf_config(config).items()
            if isinstance(value, int) or name == "hidden_act"
        }
        flags, norm_eps = FLAGS, said.get("layer_norm_eps", _HF_NORM_EPS)
    else:
        path, said = found.path, found.model or {} if naming is OURS else _measure(theirs)
        if not said:
            raise ValueError(f"{path} holds weights by tgmae's names without the settings of their network; use RUN/hf")
        compared = {name: value for name, value in asdict(config).items() if name not in ("attention", "norm_eps")}
        flags = {name: f"--model.{name.replace('_', '-')}" for name in compared}
        norm_eps = said.get("norm_eps")
    for name, ours in compared.items():
        belongs_to_decoder = name.startswith("decoder_") or name in ("use_mean_pooling", "norm_pix_loss")
        if said.get(name, ours) != ours and (has_decoder or not belongs_to_decoder):
            flag = f" ({flags[name]})" if name in flags else ""
            raise ValueError(
                f"{path} is of a different model: {name} is {said[name]} there, {ours} in this configuration{flag}"
            )
    if norm_eps is not None and (not isinstance(norm_eps, float | int) or not 0 < norm_eps < 1):
        raise ValueError(f"{path}: the epsilon of the layer norms must lie between 0 and 1, got {norm_eps}")
    return norm_eps, path


def _read_hf_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"expected config.json in {path.parent}")
    try:
        said = json.loads(path.read_text())
    except ValueError as error:
        raise DamagedFile(f"{path} is not a readable configuration: {error}") from error
    if not isinstance(said, dict):
        raise DamagedFile(f"{path} is not a readable configuration: expected a JSON object, got {json.dumps(said)}")
    return said


def _measure(theirs: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the shapes of VideoMAE's own weights show of the network."""
    blocks = [re.match(r"(encoder|decoder)\.blocks\.(\d+)\.", name) for name in theirs]
    depth = {stack: 0 for stack in ("encoder", "decoder")}
    for block in filter(None, blocks):
        depth[block[1]] = max(depth[block[1]], int(block[2]) + 1)
    said: dict[str, Any] = {"depth": depth["encoder"], "decoder_depth": depth["decoder"]}
    kernel, mlp = theirs["encoder.patch_embed.proj.weight"].shape, theirs.get("encoder.blocks.0.mlp.fc1.weight")
    if len(kernel) == 5:  # `to_ours` refuses others
        said |= {"width": kernel[0], "tubelet_size": kernel[2], "patch_size": kernel[3]}
    # `check_shapes` refuses others here, too.
    if mlp is not None and mlp.dim() == 2 and mlp.shape[1]:
        said["mlp_ratio"] = mlp.shape[0] / mlp.shape[1]
    if (bridge := theirs.get("encoder_to_decoder.weight")) is not None and bridge.dim() == 2:
        said["decoder_width"] = bridge.shape[0]
    return said


def _check_others(others: list[str], theirs: dict[str, Tensor], path: Path, config: ModelConfig) -> list[str]:
    """Return the layers of a classifier among the weights that no parameter of ours stands for.

    Positions are left out, too, if they are the fixed ones that we compute ourselves. Raises ValueError for everything
    else, because the network would compute another function without it.
    """
    classifier = [name for name in others if name.startswith(_CLASSIFIERS)]
    for name in others:
        if name.endswith(_POSITIONS):
            _check_positions(name, theirs[name], path, config)
    unknown = [name for name in others if name not in classifier and not name.endswith(_POSITIONS)]
    if unknown:
        raise ValueError(f"{path} is of a different model: there is no place here for its weight {_list(unknown)}")
    return sorted({name.removeprefix("encoder.").partition(".")[0] for name in classifier})


def _check_positions(name: str, stored: Tensor, path: Path, config: ModelConfig) -> None:
    """Refuse positions that are not the sines and cosines that this network adds."""
    table = sinusoid_table(config.num_tokens, config.decoder_width if name.startswith("decoder") else config.width)
    tolerance = 1e-5 if stored.dtype == torch.float32 else 1e-2
    if stored.numel() != table.numel() or not torch.allclose(stored.float().view_as(table), table, atol=tolerance):
        raise ValueError(
            f"{path} is of a different model: its {name} {list(stored.shape)} are not the fixed sines and cosines of "
            f"{config.num_tokens} tokens (--model.num-frames {config.num_frames}, --model.image-size "
            f"{config.image_size}); learned positions, or those of other clips, cannot be used"
        )
