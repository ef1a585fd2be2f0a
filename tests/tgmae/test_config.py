"""Presets carry the published values; combinations that cannot run are refused with the values in the message."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.config import CLIPConfig
from tgmae.config.data import DataConfig
from tgmae.config.loss import LossConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig, TrainConfig
from tgmae.config.saved import to_dict
from tgmae.config.training import LogConfig, OptimConfig, ValidationConfig
from tgmae.model.videomae import VideoMAE
from tgmae.presets import PRESETS

# docs/recipes.md, "Pretraining, ViT-B": (stride, base rate, batch, epochs, flip).
PUBLISHED = {
    "ssv2": (2, 1.5e-4, 2048, 800, False),
    "k400": (4, 1.5e-4, 2048, 800, True),
    "ucf101": (4, 3e-4, 192, 3200, True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_recipe(name: str) -> None:
    preset = PRESETS[name]
    stride, base_lr, batch_size, epochs, flip = PUBLISHED[name]
    assert (preset.data.sampling, preset.data.stride, preset.data.flip) == ("dense", stride, flip)
    assert preset.data.crop_scales == (1.0, 0.875, 0.75, 0.66)
    assert (preset.batch_size, preset.epochs) == (batch_size, epochs)
    # Fan et al. 2024, section 4: text-guided, γ = .6, the patches most like the caption, by OpenAI's ViT-B/32.
    mask = preset.mask
    assert (mask.kind, mask.ratio, mask.order, mask.scorer) == ("tgm", 0.6, "top", "auto")
    assert (preset.clip.model, preset.clip.weights) == ("ViT-B-32-quickgelu", "openai")
    optim = preset.optim
    assert (optim.base_lr, optim.warmup_lr, optim.min_lr, optim.warmup_epochs) == (base_lr, 1e-6, 1e-5, 40)
    assert (optim.betas, optim.weight_decay, optim.clip_norm) == ((0.9, 0.95), 0.05, None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_network(name: str) -> None:
    model = PRESETS[name].model
    assert (model.image_size, model.num_frames, model.patch_size, model.tubelet_size) == (224, 16, 16, 2)
    assert (model.width, model.depth, model.num_heads, model.mlp_ratio) == (768, 12, 12, 4.0)
    assert (model.decoder_width, model.decoder_depth, model.decoder_num_heads) == (384, 4, 6)
    assert (model.num_slots, model.patches_per_slot, model.num_tokens, model.values_per_token) == (8, 196, 1568, 1536)


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "batch", "millions"),
    [("vit_l", (1024, 24, 16), (512, 12, 8), 512, 343), ("vit_h", (1280, 32, 16), (640, 12, 8), 1024, 692)],
)
def test_large_presets_have_the_published_recipe(
    name: str, encoder: tuple[int, ...], decoder: tuple[int, ...], batch: int, millions: int
) -> None:
    """VideoMAE's scripts/kinetics/videomae_vit_{large,huge}_…_epoch_1600/pretrain.sh, for 64 GPUs."""
    preset = PRESETS[name]
    model, mask, optim = preset.model, preset.mask, preset.optim
    assert (model.width, model.depth, model.num_heads, model.mlp_ratio) == (*encoder, 4.0)
    assert (model.decoder_width, model.decoder_depth, model.decoder_num_heads) == decoder
    assert (model.image_size, model.num_frames, model.patch_size, model.tubelet_size) == (224, 16, 16, 2)
    assert (mask.kind, mask.ratio, preset.data.stride, preset.data.flip) == ("tube", 0.9, 4, False)
    assert (preset.epochs, preset.batch_size, preset.device_batch_size) == (1600, batch, batch // 64)
    assert (optim.base_lr, optim.warmup_epochs, optim.betas, optim.weight_decay) == (1.5e-4, 40, (0.9, 0.95), 0.05)
    assert preset.parallel == "fsdp"
    assert preset.activation_checkpointing
    with torch.device("meta"):
        assert (
            round(sum(weight.numel() for weight in VideoMAE(model).parameters()) / 1e6) == millions
        )  # as in the guide


def test_a_cuda_graph_records_no_recomputing() -> None:
    with pytest.raises(ValueError, match="--cuda-graph cannot record --activation-checkpointing; drop one of them"):
        TrainConfig(cuda_graph=True, activation_checkpointing=True)


def test_the_demo_masks_by_text_with_the_clip_that_comes_along() -> None:
    demo = PRESETS["demo"]
    assert (demo.mask.kind, demo.mask.ratio, demo.clip.model) == ("tgm", 0.6, "shapes")


def test_presets_write_to_folders_of_their_own() -> None:
    assert len({preset.run_dir for preset in PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_on_one_process(name: str) -> None:
    assert PRESETS[name].accumulation_steps(1) >= 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_size": 100}, ("--model.image-size", "100", "16")),
        ({"patch_size": 15}, ("--model.patch-size", "224", "15")),
        ({"patch_size": 0}, ("--model.patch-size", "0")),
        ({"num_frames": 15}, ("--model.num-frames", "15", "2")),
        ({"tubelet_size": 3}, ("--model.tubelet-size", "16", "3")),
        ({"num_heads": 7}, ("--model.num-heads", "768", "7")),
        ({"num_heads": 0}, ("--model.num-heads", "0")),
        ({"decoder_num_heads": 5}, ("--model.decoder-num-heads", "384", "5")),
        ({"decoder_width": 100}, ("--model.decoder-width", "100", "6")),
    ],
)
def test_impossible_geometry_is_refused(values: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"^--model\.") as caught:
        ModelConfig(**values)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_ratio_outside_zero_to_one_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"mask\.ratio .* got {ratio}"):
        MaskConfig(ratio=ratio)


@pytest.mark.parametrize("kind", ["tgm", "random", "tube"])
@pytest.mark.parametrize(("image_size", "ratio"), [(32, 0.2), (16, 0.9)])
def test_ratio_that_masks_no_patch_is_refused(image_size: int, ratio: float, kind: str) -> None:
    patches = (image_size // 16) ** 2
    with pytest.raises(ValueError, match=rf"mask\.ratio {ratio} masks 0 of the {patches} .*image-size {image_size}"):
        TrainConfig(model=ModelConfig(image_size=image_size), mask=MaskConfig(kind=kind, ratio=ratio))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stride": 0}, ("--data.stride", "0")),
        ({"repeat": 0}, ("--data.repeat", "0")),
        ({"num_workers": 0}, ("--data.num-workers", "0")),
        ({"prefetch": -1}, ("--data.prefetch", "-1")),
        ({"pipelines": 0}, ("--data.pipelines", "0")),
        ({"threads": 0}, ("--data.threads", "0")),
        ({"crop_scales": ()}, ("--data.crop-scales", "()")),
        ({"crop_scales": (1.0, 1.2)}, ("--data.crop-scales", "1.2")),
        ({"crop_scales": (0.0,)}, ("--data.crop-scales", "0.0")),
        ({"max_skipped": 1.5}, ("--data.max-skipped", "1.5")),
    ],
)
def test_impossible_data_is_refused(values: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"^--data\.") as caught:
        DataConfig(**values)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("kind", ["tgm", "random"])
@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        ("cached", r"--mask\.scores FOLDER; make it with: tgmae-data scores"),
        ("student", r"--mask\.student FILE; make it with: tgmae-engine distill"),
    ],
)
def test_scorers_that_need_a_file_ask_for_it(kind: str, scorer: str, words: str) -> None:
    """Only where text decides the mask."""
    values: dict[str, Any] = {"kind": kind, "scorer": scorer}
    if kind == "tgm":
        with pytest.raises(ValueError, match=rf"^--mask\.scorer {scorer} needs {words}"):
            MaskConfig(**values)
    else:
        MaskConfig(**values)
    MaskConfig(**values, scores=Path("scores"), student=Path("student"))


def test_clip_batch_starts_at_one() -> None:
    assert CLIPConfig(batch=1).batch == 1
    with pytest.raises(ValueError, match=r"^--clip\.batch must be at least 1, got 0"):
        CLIPConfig(batch=0)


def test_two_frames_of_a_tubelet_of_one_are_refused() -> None:
    model = ModelConfig(tubelet_size=1)
    with pytest.raises(ValueError, match=r"--mask\.frames-per-tubelet .* --model\.tubelet-size, got 2 and 1"):
        InputConfig(model=model)
    assert InputConfig(model=model, mask=MaskConfig(frames_per_tubelet=1)).model.num_slots == 16


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_torch_does_not_have_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"^--seed must lie between 0 and 2⁶³ - 1, got {seed}"):
        InputConfig(seed=seed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        *((OptimConfig, name) for name in ("base_lr", "min_lr", "warmup_epochs", "weight_decay", "clip_norm")),
        (ValidationConfig, "every"),
        *((ModelConfig, name) for name in ("norm_eps", "mlp_ratio")),
        *((LossConfig, name) for name in ("reconstruction", "contrastive", "temperature")),
    ],
)
def test_numbers_that_are_none_are_refused(config: type[Any], name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^--\w+\.{name.replace('_', '-')} must .*, got {value}"):
        config(**{name: value})


def test_validation_needs_a_split() -> None:
    """select_split("") is all videos, those that are trained on among them."""
    with pytest.raises(ValueError, match=r"--validation\.split must name a split"):
        ValidationConfig(split="")


@pytest.mark.parametrize("name", ["metrics_every", "picture_every", "checkpoint_every", "keep_checkpoints"])
def test_log_intervals_start_at_one(name: str) -> None:
    assert getattr(LogConfig(**{name: 1}), name) == 1
    with pytest.raises(ValueError, match=rf"--log\.{name.replace('_', '-')} must be at least 1, got 0"):
        LogConfig(**{name: 0})


@pytest.mark.parametrize("name", ["epochs", "batch_size", "device_batch_size"])
def test_counts_of_a_run_start_at_one(name: str) -> None:
    values: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=rf"^--{name.replace('_', '-')} must be at least 1, got 0"):
        TrainConfig(**values)


def test_batch_that_repeats_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--device-batch-size .* --data\.repeat, got 64 and 3"):
        TrainConfig(data=DataConfig(repeat=3))
    assert TrainConfig(data=DataConfig(repeat=4)).data.repeat == 4


def test_accumulation_fills_the_batch() -> None:
    config = TrainConfig(batch_size=2048, device_batch_size=64)
    assert [config.accumulation_steps(world) for world in (1, 2, 8, 32)] == [32, 16, 4, 1]


@pytest.mark.parametrize(
    ("batch", "device_batch", "world", "advice"),
    [
        (2048, 64, 3, "--batch-size 1920 or 2112, or --batch-size 2046 --device-batch-size 62, or 2 processes"),
        (2048, 64, 64, "--batch-size 4096, or --device-batch-size 32, or 32 processes"),
        (2048, 64, 48, "--batch-size 3072, or --batch-size 2064 --device-batch-size 43, or 32 processes"),
        (4, 8, 2, "--batch-size 16, or --device-batch-size 2"),
    ],
)
def test_batch_that_processes_do_not_divide_is_refused(batch: int, device_batch: int, world: int, advice: str) -> None:
    """Everything that the message offers is accepted."""
    config = TrainConfig(batch_size=batch, device_batch_size=device_batch)
    with pytest.raises(ValueError, match=rf"--batch-size .* got {batch} and {device_batch} × {world}; use {advice}$"):
        config.accumulation_steps(world)
    for offer in re.sub(r"(\d+) or (\d+)", r"\1, or --batch-size \2", advice).split(", or "):
        flags = {name: int(value) for name, value in re.findall(r"--([a-z-]+) (\d+)", offer)}
        changes = {name.replace("-", "_"): value for name, value in flags.items()}
        count = re.match(r"(\d+) process", offer)
        assert replace(config, **changes).accumulation_steps(int(count[1]) if count else world) >= 1


@pytest.mark.parametrize(
    ("ratio", "patches", "num_masked"),
    [(0.6, 196, 117), (0.9, 196, 176), (0.75, 196, 147), (0.65, 196, 127), (0.9, 10, 9), (0.3, 10, 3), (0.29, 100, 29)],
)
def test_masked_per_slot(ratio: float, patches: int, num_masked: int) -> None:
    assert MaskConfig(ratio=ratio).masked_per_slot(patches) == num_masked


@pytest.mark.parametrize("patches", [4, 9, 36, 49, 100, 196, 256, 1024])
def test_masked_per_slot_is_the_floor_of_the_decimal_ratio(patches: int) -> None:
    """Every ratio of up to three decimals, against exact fractions."""
    wrong = {}
    for thousandths in range(1, 1000):
        got = MaskConfig(ratio=thousandths / 1000).masked_per_slot(patches)
        exact = int(Fraction(thousandths, 1000) * patches)
        if got != exact:
            wrong[thousandths / 1000] = (got, exact)
    assert not wrong


@pytest.mark.parametrize("name", PRESETS)
def test_to_dict_is_plain_json_with_every_value(name: str) -> None:
    plain = to_dict(PRESETS[name])
    assert json.loads(json.dumps(plain)) == plain
    assert plain["batch_size"] == PRESETS[name].batch_size
    assert plain["data"]["manifest"] == str(PRESETS[name].data.manifest)
    assert plain["optim"]["betas"] == [0.9, 0.95]
    assert plain["model"]["width"] == PRESETS[name].model.width
    assert (plain["mask"]["kind"], plain["mask"]["scores"]) == (PRESETS[name].mask.kind, None)
    assert plain["clip"]["cache_dir"] == "~/.cache/tgmae"
