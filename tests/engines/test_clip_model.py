"""Loading a CLIP from every kind of file, and the messages if it cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import open_clip.factory
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.backends.onnx_engine import graph_fingerprint
from engines.clip_model import load_clip
from engines.config import CLIPConfig
from engines.text_cache import embed_captions
from engines.towers.clip_towers import FrameTower, PatchTower
from engines.towers.image_encoder import ImageEncoder, read_image_encoder
from tests.support.clip_models import MEAN, STD, save_small_clip, small_clip, small_config

CPU = torch.device("cpu")
CAPTIONS = ["a red ball", "", "Pushing a cup – slowly, from left to right, over the whole length of the table"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    save_small_clip(path, seed=3)
    return path


def load(model: object, weights: object = "openai", **options: Any) -> Any:
    return load_clip(CLIPConfig(model=str(model), weights=str(weights), **options))


def archive(state: dict[str, Tensor], path: Path) -> Path:
    """Write a TorchScript archive with these weights and OpenAI's three extra entries, like its ViT-B-32.pt."""

    class Holder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    root = Holder()
    for name in ("input_resolution", "context_length", "vocab_size"):
        root.register_buffer(name, torch.tensor(32))
    for key, weight in state.items():
        *parents, leaf = key.split(".")
        place: nn.Module = root
        for name in parents:
            if not hasattr(place, name):
                place.add_module(name, Holder())
            place = getattr(place, name)
        place.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
    torch.jit.trace(root, torch.zeros(1)).save(str(path))  # type: ignore[no-untyped-call]
    return path


# Files that load


def test_folder(folder: Path) -> None:
    clip = load(folder)
    model = small_clip(3)
    for (name, ours), (other, saved) in zip(clip.model.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours, saved)
    assert (clip.mean, clip.std) == (MEAN, STD)
    assert not clip.model.training
    assert not any(weight.requires_grad for weight in clip.model.parameters())
    assert {weight.dtype for weight in clip.model.parameters()} == {torch.float32}
    patches = torch.randn(3, 192)
    assert torch.equal(PatchTower(clip.visual, 8)(patches), PatchTower(model.visual, 8)(patches))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt", "pt of training", "half pt", "safetensors", "torchscript"])
def test_weights_from_a_file(kind: str, named: str, tmp_path: Path) -> None:
    state = {name: weight.clone() for name, weight in small_clip(4).state_dict().items()}
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "half pt":
        state = {name: weight.half() for name, weight in state.items()}
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "torchscript":
        archive(state, path)
    elif kind == "pt of training":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": weight for name, weight in state.items()}}, path)
    else:
        torch.save(state, path)
    clip = load(named, path, trust_code=kind == "torchscript")
    for name, weight in clip.model.state_dict().items():
        assert torch.equal(weight, state[name].float())
    assert clip.mean == open_clip.OPENAI_DATASET_MEAN


def test_a_pickle_that_runs_code_is_not_run(named: str, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"logit_scale": Attack()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt is not a checkpoint of the CLIP tgmae-test"):
        load(named, tmp_path / "weights.pt")
    assert not (tmp_path / "harm").exists()


def test_the_demos_clip_is_there() -> None:
    clip = load("shapes")
    assert clip.visual.grid_size == (3, 3)


# The image encoder without open_clip


@pytest.mark.parametrize(
    ("quick_gelu", "vision"),
    [(True, {}), (False, {}), (True, {"mlp_ratio": 2.5, "head_width": 16, "image_size": 24, "layers": 1})],
)
def test_the_image_encoder_is_open_clips(quick_gelu: bool, vision: dict[str, Any], tmp_path: Path) -> None:
    save_small_clip(tmp_path, quick_gelu=quick_gelu, **vision)
    read = read_image_encoder(tmp_path)
    assert read is not None
    ours, mean, std = read
    assert (mean, std) == (MEAN, STD)
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval().requires_grad_(False)
    for make in (lambda visual: PatchTower(visual, 8), lambda visual: FrameTower(visual, 32, 48, 8, "sclip")):
        one, other = make(ours), make(model.visual)
        assert graph_fingerprint(one) == graph_fingerprint(other)  # weights, activation, norms and heads
        x = torch.randn(2, *one.input_shape)
        assert torch.equal(one(x), other(x))


def test_the_demos_image_encoder_is_open_clips() -> None:
    clip = load("shapes")
    state = clip.model.visual.state_dict()
    assert isinstance(clip.visual, ImageEncoder)
    assert clip.visual.state_dict().keys() == state.keys()
    assert all(torch.equal(weight, state[name]) for name, weight in clip.visual.state_dict().items())
    assert (clip.mean, clip.std) == (clip.open_clip.mean, clip.open_clip.std)


@pytest.mark.parametrize(
    "vision", [{"ls_init_value": 0.1}, {"no_ln_pre": True}, {"act_kwargs": {"approximate": "tanh"}, "quick": False}]
)
def test_what_is_unusual_is_left_to_open_clip(vision: dict[str, Any], tmp_path: Path) -> None:
    quick_gelu = vision.pop("quick", True)
    model = save_small_clip(tmp_path, quick_gelu=quick_gelu, **vision)
    assert read_image_encoder(tmp_path) is None
    patches = torch.randn(3, 192)
    assert torch.equal(PatchTower(load(tmp_path).visual, 8)(patches), PatchTower(model.visual, 8)(patches))


def test_captions_that_are_kept_need_no_open_clip(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = embed_captions(load(folder), CAPTIONS, tmp_path, CPU)

    def refuse(config: CLIPConfig) -> None:
        raise AssertionError("open_clip was asked")

    monkeypatch.setattr("engines.open_clip_model.load_open_clip", refuse)
    again, too_long = embed_captions(load(folder), CAPTIONS, tmp_path, CPU)
    assert torch.equal(again, first)
    assert sum(too_long) == 1
    with pytest.raises(AssertionError, match="open_clip was asked"):
        embed_captions(load(folder), ["a caption of its own"], tmp_path, CPU)


# Files that do not


def test_an_unknown_model_is_answered_with_names_like_it() -> None:
    with pytest.raises(ValueError, match=r"no model 'ViT-B32'; did you mean ViT-B-32 .*a folder saved by open_clip"):
        load("ViT-B32")
    with pytest.raises(ValueError, match=r"no model 'no/such/folder' \(--clip\.model is an open_clip name, a folder"):
        load("no/such/folder")


def test_unknown_weights_are_answered_with_the_tags() -> None:
    said = r"no weights 'opena' for ViT-B-32-quickgelu: --clip\.weights is neither .* \(openai, laion400m"
    with pytest.raises(ValueError, match=said):
        load("ViT-B-32-quickgelu", "opena")


@pytest.mark.parametrize("kind", ["garbage", "empty", "truncated", "another model", "no weights", "a list"])
def test_a_file_that_is_not_a_checkpoint(kind: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    state = small_clip(4).state_dict()
    if kind in ("garbage", "empty"):
        path.write_bytes(b"garbage" * 100 if kind == "garbage" else b"")
    elif kind == "truncated":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        others = {"another model": small_clip(4, width=64).state_dict(), "no weights": {}, "a list": [1, 2]}
        torch.save(others[kind], path)
    with pytest.raises(ValueError, match=rf"weights\.\w+ is not a checkpoint of the CLIP {named}: .") as caught:
        load(named, path)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_clip(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no weights \(expected open_clip_model.safetensors"):
        load(tmp_path)
    shutil.copy(folder / "open_clip_model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="config file missing"):
        load(tmp_path)
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    load(tmp_path)
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is not a checkpoint of"):
        load(tmp_path)


def test_without_a_network_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    said = r"weights 'openai' of ViT-B-32-quickgelu could not be downloaded: .*"
    with pytest.raises(ValueError, match=said) as caught:
        load("ViT-B-32-quickgelu")
    assert "--clip.weights FILE" in str(caught.value)
    assert "--clip.model FOLDER" in str(caught.value)


def test_an_image_encoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = small_config()
    config["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    save_small_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**config).state_dict(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"a ViT with a class token, such as ViT-B-32; .* has ModifiedResNet"):
        load(tmp_path)


def test_an_image_encoder_without_a_class_token_is_refused(tmp_path: Path) -> None:
    save_small_clip(tmp_path, pool_type="avg")
    with pytest.raises(ValueError, match="a ViT with a class token"):
        load(tmp_path)


# The fingerprint


def test_fingerprint_changes_with_any_weight(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    first = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == first
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    prints, keys = {first}, {load(tmp_path).captions_key}
    names = ["logit_scale", "visual.conv1.weight", "transformer.resblocks.1.mlp.c_fc.bias", "token_embedding.weight"]
    for name in names:
        changed = {key: weight.clone() for key, weight in weights.items()}
        changed[name].view(-1)[-1] += 1e-3
        save_file(changed, tmp_path / "open_clip_model.safetensors")
        prints.add(load(tmp_path).fingerprint)
        keys.add(load(tmp_path).captions_key)
    assert len(prints) == len(keys) == 1 + len(names)


def test_fingerprint_changes_with_what_weights_do_not_tell(folder: Path, tmp_path: Path) -> None:
    """Caption embeddings kept for ViT-B-32 must not serve ViT-B-32-quickgelu with the same weights."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "open_clip_config.json").read_text())
    prints, keys = {load(folder).fingerprint}, {load(folder).captions_key}
    model, preprocess = config["model_cfg"], config["preprocess_cfg"]
    for other in (
        {"model_cfg": {**model, "quick_gelu": False}, "preprocess_cfg": preprocess},
        {"model_cfg": {**model, "vision_cfg": {**model["vision_cfg"], "head_width": 16}}, "preprocess_cfg": preprocess},
        {"model_cfg": {**model, "text_cfg": {**model["text_cfg"], "heads": 4}}, "preprocess_cfg": preprocess},
        {"model_cfg": model, "preprocess_cfg": {**preprocess, "mean": (0.5, 0.5, 0.5)}},
    ):
        (tmp_path / "open_clip_config.json").write_text(json.dumps(other))
        prints.add(load(tmp_path).fingerprint)
        keys.add(load(tmp_path).captions_key)
    assert len(prints) == len(keys) == 5


# Captions


@pytest.mark.parametrize("batch", [1, 2, 256])
def test_encode_text_is_clips_own(folder: Path, batch: int) -> None:
    clip = load(folder)
    tokens = open_clip.tokenize(CAPTIONS, context_length=12)
    expected = small_clip(3).encode_text(tokens)  # type: ignore[operator]
    expected = expected / expected.norm(dim=1, keepdim=True)
    ours = clip.encode_text(CAPTIONS, CPU, batch=batch)
    assert ours.shape == (3, 16)
    assert (ours.dtype, ours.device) == (torch.float32, CPU)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_captions_that_are_cut_off_are_counted(folder: Path) -> None:
    clip = load(folder)  # a context of 12: ten words between start and end
    assert sum(clip.too_long(CAPTIONS)) == 1
    assert clip.too_long(["a " * 10, "a " * 11, "a " * 12]) == [False, True, True]
    assert clip.too_long([]) == []
