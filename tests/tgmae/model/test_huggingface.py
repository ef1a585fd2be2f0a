"""The model is Hugging Face's VideoMAEForPreTraining: same outputs, loss and gradients; weights convert both ways.

Dimensions: B clips, T frames, H W pixels.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from dali_pipelines.types import ClipRequest, CropBox
from kernels.gather_tokens import MEAN, STD
from tests.support.disks import full_disk
from tests.support.videos import clip_batch
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.masks.noise_scorer import NoiseScorer
from tgmae.masks.select import select_masks
from tgmae.model.huggingface import export_hf, import_hf, make_hf_config, read_step
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import VideoMAE

SMALL = ModelConfig(
    image_size=48, num_frames=4, width=32, depth=3, num_heads=4, decoder_width=24, decoder_depth=2, decoder_num_heads=2
)
# Another patch, tubelet, MLP and norm.
OTHER = replace(SMALL, patch_size=8, num_frames=6, tubelet_size=3, mlp_ratio=2.0, norm_eps=1e-12, depth=1)

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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: models this small take ten times as long when threads have to be woken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Add noise to every parameter: initial biases are 0 and norms 1, which would hide a swapped name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def our_model(config: ModelConfig, seed: int) -> VideoMAE:
    torch.manual_seed(seed)
    model = VideoMAE(config)
    randomise(model, seed)
    return model


def hf_model(config: ModelConfig, seed: int) -> VideoMAEForPreTraining:
    """Make the model from Hugging Face's own configuration class, not from what `make_hf_config` writes."""
    torch.manual_seed(seed)
    model = VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_frames=config.num_frames,
            tubelet_size=config.tubelet_size,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=int(config.width * config.mlp_ratio),
            decoder_hidden_size=config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_num_heads,
            decoder_intermediate_size=int(config.decoder_width * config.mlp_ratio),
            layer_norm_eps=config.norm_eps,
            use_mean_pooling=False,
            attn_implementation="eager",
        )
    )
    randomise(model, seed)
    return model.eval()


def load_hf(folder: Path) -> VideoMAEForPreTraining:
    """Load with from_pretrained, which must find every weight and use every weight."""
    model, report = VideoMAEForPreTraining.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", local_files_only=True
    )
    assert not any(report.values()), report
    return model.eval()


def inputs(config: ModelConfig, kind: str, seed: int, batch: int = 3) -> tuple[Tensor, TokenMasks]:
    shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    crop = CropBox(x=0, y=0, width=1, height=1)
    requests = tuple(
        ClipRequest(row=0, epoch=0, position=i, frames=(0,), crop=crop, flip=False, caption=0, mask_seed=100 * seed + i)
        for i in range(batch)
    )
    mask = MaskConfig(kind=kind, ratio=0.7)  # type: ignore[arg-type]
    scorer = NoiseScorer(kind, config.num_slots, config.patches_per_slot, torch.device("cpu"))  # type: ignore[arg-type]
    return frames, select_masks(mask, config, scorer(clip_batch(frames, requests)))


def pixel_values(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise frames uint8 [B, T, H, W, 3] with ImageNet's statistics: [B, T, 3, H, W]."""
    mean, std = torch.tensor(MEAN, dtype=dtype), torch.tensor(STD, dtype=dtype)
    return ((frames.to(dtype) / 255 - mean) / std).permute(0, 1, 4, 2, 3)


def bool_masked_pos(config: ModelConfig, masks: TokenMasks) -> Tensor:
    empty = torch.zeros(len(masks.masked), config.num_tokens, dtype=torch.bool)
    return empty.scatter(1, masks.masked.long(), True)


def assert_near(ours: Tensor, theirs: Tensor, name: str, tolerance: float = 1e-5) -> None:
    """Check that the two are equal within `tolerance` of the largest value."""
    assert ours.shape == theirs.shape, name
    error, size = (ours - theirs).abs().max(), theirs.abs().max()
    assert error <= tolerance * size, f"{name}: {error:.2e} of {size:.2e}"


def assert_same_function(ours: VideoMAE, theirs: VideoMAEForPreTraining, kind: str, seed: int) -> None:
    """Compare encoder output, prediction and loss."""
    config, dtype = ours.config, ours.patch_embed.weight.dtype
    frames, masks = inputs(config, kind, seed)
    pixels, masked = pixel_values(frames, dtype), bool_masked_pos(config, masks)
    loss, prediction = ours(frames, masks)
    expected = theirs(pixels, bool_masked_pos=masked)
    features = theirs.videomae(pixels, bool_masked_pos=masked).last_hidden_state
    assert_near(ours.encode(frames, masks.visible), features, "encoder output")
    assert_near(prediction, expected.logits, "prediction")
    assert_near(loss, expected.loss, "loss")


def gradients_by_hf_name(model: VideoMAE, folder: Path) -> dict[str, Tensor]:
    """Export a model whose weights are replaced by their gradients."""
    carrier = copy.deepcopy(model)
    with torch.no_grad():
        for (name, parameter), place in zip(model.named_parameters(), carrier.parameters(), strict=True):
            assert parameter.grad is not None, name
            place.copy_(parameter.grad)
    export_hf(carrier, folder)
    return load_file(folder / "model.safetensors")


def to_old_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights as in the checkpoints published before 2025."""
    for part in ("query", "value"):
        old = f"attention.attention.{part[0]}_bias"
        weights = {name.replace(f"attention.attention.{part}.bias", old): w for name, w in weights.items()}
    return weights


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
    expected = {name: p.grad for name, p in theirs.named_parameters()}
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    weights, config = ((tmp_path / name).stat().st_mode for name in ("model.safetensors", "config.json"))
    assert weights == config


def test_import_and_export_change_no_bit(tmp_path: Path) -> None:
    theirs, ours = hf_model(SMALL, 7), our_model(SMALL, 8)
    theirs.save_pretrained(tmp_path / "in")
    import_hf(ours, tmp_path / "in")
    export_hf(ours, tmp_path / "out")
    got, expected = load_file(tmp_path / "out" / "model.safetensors"), theirs.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_imported_weights_are_independent_of_the_file(tmp_path: Path) -> None:
    """Overwriting the file changes nothing, although safetensors maps it into memory."""
    export_hf(our_model(SMALL, 9), tmp_path)
    ours = our_model(SMALL, 10)
    import_hf(ours, tmp_path)
    before = {name: w.clone() for name, w in ours.state_dict().items()}
    export_hf(our_model(SMALL, 11), tmp_path)
    assert all(torch.equal(w, before[name]) for name, w in ours.state_dict().items())
    assert all(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_published_naming_imports(file: str, tmp_path: Path) -> None:
    """MCG-NJU's checkpoints call the biases q_bias and v_bias and come as pytorch_model.bin."""
    theirs, ours = hf_model(SMALL, 12), our_model(SMALL, 13)
    old = to_old_names(theirs.state_dict())
    assert sum(name.endswith(("q_bias", "v_bias")) for name in old) == 2 * (SMALL.depth + SMALL.decoder_depth)
    if file.endswith(".bin"):
        torch.save(old, tmp_path / file)
    else:
        from safetensors.torch import save_file

        save_file(old, tmp_path / file)
    theirs.config.save_pretrained(tmp_path)
    import_hf(ours, tmp_path)
    assert_same_function(ours, theirs, "tube", 12)


def test_weights_of_half_precision_import(tmp_path: Path) -> None:
    theirs, ours = hf_model(SMALL, 14), our_model(SMALL, 15)
    theirs.half().save_pretrained(tmp_path)
    import_hf(ours, tmp_path)
    assert ours.mask_token.dtype == torch.float32
    assert_same_function(ours, theirs.float(), "random", 14)


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
    assert got == {name: list(weight.shape) for name, weight in theirs.state_dict().items()}
    differing = {
        name: (value, VIDEOMAE_BASE.get(name, "absent"))
        for name, value in make_hf_config(config).items()
        if VIDEOMAE_BASE.get(name, "absent") != value
    }
    # The published file holds the default of the class for the norms; VideoMAE's own code has 1e-6.
    assert differing == {"layer_norm_eps": (1e-6, 1e-12), "qv_bias": (True, "absent")}


CHANGES: list[tuple[dict[str, Any], str, int, int]] = [
    ({"depth": 2}, "num_hidden_layers", 3, 2),
    ({"depth": 4}, "num_hidden_layers", 3, 4),
    ({"width": 64}, "hidden_size", 32, 64),
    ({"num_heads": 2}, "num_attention_heads", 4, 2),
    ({"image_size": 64}, "image_size", 48, 64),
    ({"num_frames": 8}, "num_frames", 4, 8),
    ({"tubelet_size": 4}, "tubelet_size", 2, 4),
    ({"patch_size": 8}, "patch_size", 16, 8),
    ({"mlp_ratio": 2.0}, "intermediate_size", 128, 64),
    ({"decoder_width": 48}, "decoder_hidden_size", 24, 48),
    ({"decoder_depth": 1}, "decoder_num_hidden_layers", 2, 1),
    ({"decoder_num_heads": 4}, "decoder_num_attention_heads", 2, 4),
]


@pytest.mark.parametrize(("change", "name", "there", "here"), CHANGES)
def test_a_different_architecture_is_refused(
    change: dict[str, Any], name: str, there: int, here: int, tmp_path: Path
) -> None:
    hf_model(SMALL, 16).save_pretrained(tmp_path)
    ours = our_model(replace(SMALL, **change), 17)
    before = {key: w.clone() for key, w in ours.state_dict().items()}
    flag = f"--model.{next(iter(change)).replace('_', '-')}"
    message = rf"{name} is {there} there, {here} in this configuration \({flag}\)"
    with pytest.raises(ValueError, match=message) as caught:
        import_hf(ours, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert all(torch.equal(w, before[key]) for key, w in ours.state_dict().items())


def test_weights_that_contradict_their_config_are_refused(tmp_path: Path) -> None:
    """Refuse a config.json that claims our shape next to weights of another shape."""
    export_hf(our_model(replace(SMALL, width=64), 18), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(make_hf_config(SMALL)))
    with pytest.raises(ValueError, match=r"\[64, 1536\] there, \[32, 1536\] in this configuration"):
        import_hf(our_model(SMALL, 19), tmp_path)


def test_missing_weight_is_refused_by_name(tmp_path: Path) -> None:
    theirs = hf_model(SMALL, 20)
    weights = {name: w for name, w in theirs.state_dict().items() if "decoder_layers.1." not in name}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weight decoder\.decoder_layers\.1\.") as caught:
        import_hf(our_model(SMALL, 21), tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors or pytorch_model\.bin") as caught:
            import_hf(our_model(SMALL, 22), folder)
        assert str(folder) in str(caught.value)


def test_weights_without_their_config_are_refused(tmp_path: Path) -> None:
    export_hf(our_model(SMALL, 23), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        import_hf(our_model(SMALL, 24), tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_is_refused(file: str, tmp_path: Path) -> None:
    theirs = hf_model(SMALL, 25)
    theirs.save_pretrained(tmp_path)
    if file.endswith(".bin"):
        torch.save(theirs.state_dict(), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"cannot read weights from .*{file}"):
        import_hf(our_model(SMALL, 26), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_no_flipped_bit_changes_what_is_imported(file: str, tmp_path: Path) -> None:
    """300 single flips of each file: refused by its name, or the weights are exactly what was exported."""
    export_hf(our_model(SMALL, 27), tmp_path, step=3)
    if file == "pytorch_model.bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    ours, generator = our_model(SMALL, 28), random.Random(0)
    import_hf(ours, tmp_path)
    saved = {name: weight.clone() for name, weight in ours.state_dict().items()}
    whole, messages = (tmp_path / file).read_bytes(), []
    for _ in range(300):
        changed, bit = bytearray(whole), generator.randrange(8 * len(whole))
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "new").write_bytes(changed)  # a file that is mapped into memory must not be written to
        (tmp_path / "new").replace(tmp_path / file)
        try:
            import_hf(ours, tmp_path)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert all(torch.equal(weight, saved[name]) for name, weight in ours.state_dict().items())
    assert len(messages) > 50
    assert all(str(tmp_path) in message and "weights_only" not in message for message in messages)


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
    assert sorted(path.name for path in hf.iterdir()) == ["README.md", "config.json", "model.safetensors", "notes"]
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
