"""The model is Hugging Face's VideoMAEForPreTraining: same outputs, loss and gradients; an export is read by it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEImageProcessor

from tests.support.faults.disks import full_disk
from tests.tgmae.model.networks import (
    OTHER,
    SMALL,
    assert_near,
    assert_same_function,
    bool_masked_pos,
    hf_model,
    import_hf,
    inputs,
    our_model,
    pixel_values,
    to_published_names,
)
from tgmae.config.model import ModelConfig
from tgmae.model.huggingface import export_hf, make_hf_config, read_step
from tgmae.model.videomae import VideoMAE
from tgmae.presets import PRESETS
from tgmae.shapes.scenes import make_shapes

README = Path(__file__).resolve().parents[3] / "README.md"

# config.json of MCG-NJU/videomae-base.
VIDEOMAE_BASE: dict[str, Any] = {
    "architectures": ["VideoMAEForPreTraining"],
    "attention_probs_dropout_prob": 0.0,
    "decoder_hidden_size": 384,
    "decoder_intermediate_size": 1536,
    "decoder_num_attention_heads": 6,
    "decoder_num_hidden_layers": 4,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 768,
    "image_size": 224,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "model_type": "videomae",
    "norm_pix_loss": True,
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_frames": 16,
    "num_hidden_layers": 12,
    "patch_size": 16,
    "qkv_bias": True,
    "torch_dtype": "float32",
    "tubelet_size": 2,
    "use_mean_pooling": False,
}


def load_hf(folder: Path) -> VideoMAEForPreTraining:
    """Load with from_pretrained, which must find every weight and use every weight."""
    model, report = VideoMAEForPreTraining.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", local_files_only=True
    )
    assert not any(report.values()), report
    return model.eval()


def gradients_by_hf_name(model: VideoMAE, folder: Path) -> dict[str, Tensor]:
    """Export a model whose weights are replaced by their gradients."""
    carrier = copy.deepcopy(model)
    with torch.no_grad():
        for (name, parameter), place in zip(model.named_parameters(), carrier.parameters(), strict=True):
            assert parameter.grad is not None, name
            place.copy_(parameter.grad)
    export_hf(carrier, folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
@pytest.mark.parametrize("kind", ["random", "tube"])
@pytest.mark.parametrize("seed", [0, 1])
def test_same_function(config: ModelConfig, kind: str, seed: int, tmp_path: Path) -> None:
    theirs = hf_model(config, seed)
    theirs.save_pretrained(tmp_path)
    ours = our_model(config, seed + 10)
    import_hf(ours, tmp_path)
    assert_same_function(ours, theirs, kind, seed)


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
@pytest.mark.parametrize("kind", ["random", "tube"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_same_gradients(config: ModelConfig, kind: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    ours = our_model(config, 2)
    export_hf(ours, tmp_path / "weights")
    theirs, ours = load_hf(tmp_path / "weights").to(dtype), ours.to(dtype)
    frames, masks = inputs(config, kind, 3)
    ours(frames, masks)[0].backward()
    theirs(pixel_values(frames, dtype), bool_masked_pos=bool_masked_pos(config, masks)).loss.backward()
    got = gradients_by_hf_name(ours, tmp_path / "gradients")
    expected = to_published_names({name: p.grad for name, p in theirs.named_parameters()})
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        assert_near(got[name], gradient, name, tolerance)


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
def test_export_loads_in_transformers(config: ModelConfig, tmp_path: Path) -> None:
    ours = our_model(config, 4)
    export_hf(ours, tmp_path / "new" / "hf")  # the folder is made
    assert_same_function(ours, load_hf(tmp_path / "new" / "hf"), "random", 4)


def test_export_and_import_change_no_bit(tmp_path: Path) -> None:
    first, second = our_model(SMALL, 5), our_model(SMALL, 6)
    export_hf(first, tmp_path)
    import_hf(second, tmp_path)
    for name, weight in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight), name


def test_an_export_is_readable_by_all_and_whole(tmp_path: Path) -> None:
    """safetensors alone writes files that only their owner may read."""
    export_hf(our_model(SMALL, 5), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_import_and_export_change_no_bit(tmp_path: Path) -> None:
    theirs, ours = hf_model(SMALL, 7), our_model(SMALL, 8)
    theirs.save_pretrained(tmp_path / "in")
    import_hf(ours, tmp_path / "in")
    export_hf(ours, tmp_path / "out")
    got, expected = load_file(tmp_path / "out" / "model.safetensors"), to_published_names(theirs.state_dict())
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_vit_b_has_the_published_names_and_shapes(tmp_path: Path) -> None:
    config = ModelConfig()
    with torch.device("meta"):
        ours = VideoMAE(config)
        theirs = VideoMAEForPreTraining(VideoMAEConfig(**VIDEOMAE_BASE))
    export_hf(ours.to_empty(device="cpu"), tmp_path)  # the values are arbitrary
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        got = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    (tmp_path / "model.safetensors").unlink()  # 377 MB
    assert got == {name: list(weight.shape) for name, weight in to_published_names(theirs.state_dict()).items()}
    differing = {
        name: (value, VIDEOMAE_BASE.get(name, "absent"))
        for name, value in make_hf_config(config).items()
        if VIDEOMAE_BASE.get(name, "absent") != value
    }
    # The published file holds the default of the class for the norms; VideoMAE's own code has 1e-6.
    assert differing == {"layer_norm_eps": (1e-6, 1e-12), "qv_bias": (True, "absent")}


def test_an_export_says_its_step(tmp_path: Path) -> None:
    assert read_step(tmp_path / "hf") is None
    export_hf(our_model(SMALL, 29), tmp_path / "hf")
    assert read_step(tmp_path / "hf") is None
    export_hf(our_model(SMALL, 29), tmp_path / "hf", step=12)
    assert read_step(tmp_path / "hf") == 12
    (tmp_path / "hf" / "config.json").unlink()
    assert read_step(tmp_path / "hf") is None


def test_an_export_replaces_an_older_one_and_keeps_other_files(tmp_path: Path) -> None:
    """What killed exports left is deleted."""
    hf = tmp_path / "hf"
    export_hf(our_model(SMALL, 30), hf, step=1)
    (hf / "README.md").write_text("mine")
    (hf / "notes").mkdir()
    (hf / "notes" / "one.txt").write_text("mine too")
    (tmp_path / "hf.123.tmp").mkdir()
    (tmp_path / "hf.123.tmp" / "model.safetensors").touch()
    export_hf(our_model(SMALL, 31), hf, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert {path.name for path in hf.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "notes", "preprocessor_config.json",
    }  # fmt: skip
    assert (hf / "notes" / "one.txt").read_text() == "mine too"
    assert read_step(hf) == 2


def test_an_export_that_fails_leaves_the_older_one(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    export_hf(our_model(SMALL, 32), hf, step=1)
    whole = (hf / "model.safetensors").read_bytes()
    with full_disk(100_000), pytest.raises(OSError, match=r"could not write .*hf/model\.safetensors: .*"):
        export_hf(our_model(SMALL, 33), hf, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (hf / "model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_the_features_in_the_readme_are_our_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = README.read_text(encoding="utf-8")
    [example] = [code for code in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL) if "features =" in code]
    make_shapes(tmp_path / "data/shapes", count=1, seed=0, codec="h264", num_objects=1, num_workers=1)
    model = VideoMAE(PRESETS["demo"].model)
    torch.nn.init.normal_(model.encoder[0].attention.q_bias)  # biases begin at 0
    export_hf(model, tmp_path / "runs/demo/hf")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    processor = VideoMAEImageProcessor.from_pretrained("runs/demo/hf")
    cropped = processor(names["frames"][:32:4], do_rescale=False, do_normalize=False, return_tensors="pt")
    frames = cropped["pixel_values"].to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
    with torch.no_grad():
        expected = model.encode(frames, torch.arange(model.config.num_tokens, dtype=torch.int32)[None]).mean(1)
    assert list(names["features"].shape) == [1, 128]
    assert torch.allclose(names["features"], expected, atol=1e-5)
