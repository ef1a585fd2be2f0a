"""The size of a pass: it fills the chip, stays within its memory, and consists of whole frames."""

from __future__ import annotations

from dataclasses import replace

import open_clip
import pytest
import torch

from engines import auto_batch
from engines.auto_batch import Chip, fill_chip, inputs_per_pass
from engines.config import CLIPConfig
from engines.towers.clip_towers import FrameTower, PatchTower, StudentTower, Tower
from tests.support.clip_models import small_clip, vit_b_32

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
H200 = Chip(memory_bytes=140 * 2**30, multiprocessors=132)
GIB = 2**30


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_batch, "read_chip", lambda device: H200)


def large(name: str) -> PatchTower:
    """Make a patch tower with the sizes of a large CLIP; its weights are not used."""
    config = open_clip.get_model_config(name)["vision_cfg"]
    tower = PatchTower(vit_b_32().visual, 16)
    width = config["width"]
    tower.tokens, tower.width = (224 // config["patch_size"]) ** 2 + 1, width
    tower.peak_values = tower.tokens * int(2 * width * (1 + config.get("mlp_ratio", 4)))
    return tower


@pytest.mark.slow
def test_towers_know_their_widest_point() -> None:
    visual = vit_b_32().visual
    patch, frame = PatchTower(visual, 16), FrameTower(visual, 448, 448, 32, "clearclip")
    assert (patch.tokens, patch.width, patch.peak_values) == (50, 768, 50 * 10 * 768)
    assert (frame.tokens, frame.width, frame.peak_values) == (197, 768, 197 * 10 * 768)
    few_tokens = FrameTower(small_clip(1).visual, 64, 64, 32, "clearclip")
    assert few_tokens.peak_values == 5 * 10 * 32
    student = StudentTower(16, 1024, 512)
    assert (student.tokens, student.width, student.peak_values) == (1, 512, 768 + 2048)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory_gib", "processors", "itemsize", "expected"),
    [
        (140, 132, 2, 3605),  # 32 · 132 tiles of 128 × 256 outputs, 768 · 50 outputs per patch
        (140, 132, 4, 3605),
        (140, 66, 2, 1803),
        (24, 132, 2, 24 * GIB // 16 // (50 * 7680 * 2)),  # 2097: limited by memory
        (24, 132, 4, 24 * GIB // 16 // (50 * 7680 * 4)),
        (1e-6, 132, 2, 1),
    ],
)
def test_a_pass_fills_the_chip_within_its_memory(
    memory_gib: float, processors: int, itemsize: int, expected: int
) -> None:
    chip = Chip(memory_bytes=int(memory_gib * GIB), multiprocessors=processors)
    assert fill_chip(PatchTower(vit_b_32().visual, 16), itemsize, chip) == expected


@pytest.mark.slow
def test_larger_clips_take_smaller_passes(h200: None) -> None:
    sizes = []
    for name in ("ViT-B-32", "ViT-L-14", "ViT-bigG-14"):
        sizes.append(inputs_per_pass(large(name), CLIPConfig(), 196, 2, CUDA))
    assert sizes == [3528, 392, 196]  # 18 frames, two, one


def test_whole_frames_where_one_fits(h200: None) -> None:
    visual = vit_b_32().visual
    tower: Tower = PatchTower(visual, 16)
    assert inputs_per_pass(tower, CLIPConfig(), 36, 2, CUDA) == 100 * 36
    assert inputs_per_pass(tower, CLIPConfig(), 4000, 2, CUDA) == 3605
    frames = FrameTower(visual, 448, 448, 32, "clearclip")
    assert inputs_per_pass(frames, CLIPConfig(), 196, 2, CUDA) == 915
    for device in (CPU, CUDA):  # --clip.batch counts patches on every device
        for batch, whole in ((1, 1), (35, 35), (36, 36), (100, 72)):
            asked = replace(CLIPConfig(), batch=batch)
            assert inputs_per_pass(tower, asked, 36, 2, device) == whole
            assert inputs_per_pass(frames, asked, 36, 2, device) == max(1, batch // 36)


def test_a_batch_is_split_into_equal_passes(h200: None) -> None:
    """A CUDA graph is recorded for one size: one that is larger than a batch would never be replayed."""
    student = StudentTower(16, 1024, 512)
    assert inputs_per_pass(student, CLIPConfig(), 196, 2, CUDA) == 270_284
    for clips, expected in ((64, 200_704), (32, 100_352), (128, 200_704)):
        assert inputs_per_pass(student, CLIPConfig(), 196, 2, CUDA, clips * 8 * 2) == expected
    assert inputs_per_pass(student, CLIPConfig(), 300_000, 2, CUDA, 8) == 270_336  # no whole frame
    assert inputs_per_pass(student, replace(CLIPConfig(), batch=5 * 196), 196, 2, CUDA, 8) == 5 * 196  # as asked


@pytest.mark.slow
def test_whole_frames_are_split_evenly_too(h200: None) -> None:
    frames = FrameTower(vit_b_32().visual, 448, 448, 32, "clearclip")
    assert inputs_per_pass(frames, CLIPConfig(), 196, 2, CUDA, 1024) == 512  # 915 and a remainder without


def test_a_cpu_takes_few() -> None:
    visual = small_clip(1).visual
    assert inputs_per_pass(PatchTower(visual, 8), CLIPConfig(), 36, 4, CPU) == 14 * 36
    assert inputs_per_pass(FrameTower(visual, 48, 48, 8, "sclip"), CLIPConfig(), 36, 4, CPU) == 14
    assert inputs_per_pass(PatchTower(visual, 8), CLIPConfig(), 1000, 4, CPU) == 512


@pytest.mark.gpu
def test_the_chip_is_read() -> None:
    chip = auto_batch.read_chip(CUDA)
    assert chip.memory_bytes > GIB
    assert 1 <= chip.multiprocessors < 1000
