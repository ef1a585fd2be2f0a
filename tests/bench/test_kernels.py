"""The bytes of the kernels are counted right, and the benchmarks of kernels and launches run through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import kernel_tuning, kernels
from bench.workloads import kernel_operations
from bench.workloads.kernel_operations import COPY, MEAN, OPERATIONS, STD, Inputs, Size
from kernels.gather_tokens import gather_tokens_reference
from kernels.launch import Launch, block_of_values
from kernels.masked_mse import masked_mse_reference
from tests.support.cubes import DEVICE
from tests.support.reports import read_report
from tgmae.config.model import ModelConfig

TINY = ModelConfig(image_size=32, num_frames=4, patch_size=8, width=32, depth=1, num_heads=2, decoder_width=32,
                   decoder_depth=1, decoder_num_heads=2)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_moved_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    size = Size("tiny", TINY, batch=3, ratio=0.6, dtype=dtype)
    inputs = Inputs(size, torch.device("cpu"))
    cube = (TINY.patch_size, TINY.tubelet_size)
    visible, masked, prediction = inputs.visible, inputs.masked, inputs.prediction
    moved = inputs.scores.nbytes + visible.nbytes + masked.nbytes
    assert size.bytes_moved("topk_mask") == moved

    tokens = gather_tokens_reference(inputs.frames, visible, *cube, dtype, MEAN, STD)
    share = visible.shape[1] / TINY.num_tokens
    moved = round(inputs.frames.nbytes * share) + visible.nbytes + tokens.nbytes
    assert size.bytes_moved("gather_tokens") == moved

    read = round(inputs.frames.nbytes * (1 - share)) + masked.nbytes + prediction.nbytes
    saved = torch.empty(3, masked.shape[1], 3, 2)  # mean and reciprocal deviation, as masked_mse.py stores them
    sums = torch.empty(3, masked.shape[1])
    assert size.bytes_moved("masked_mse forward") == read + saved.nbytes + sums.nbytes
    loss = masked_mse_reference(prediction, inputs.frames, masked, *cube)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert gradient.dtype == dtype
    assert size.bytes_moved("masked_mse backward") == read + saved.nbytes + gradient.nbytes


def test_production_bytes_agree_with_the_kernels_own_figures() -> None:
    """The figures are from the kernels' docstrings: bfloat16, 64 clips of 16×224², γ = .6."""
    size = Size("", ModelConfig(), batch=64, ratio=0.6, dtype=torch.bfloat16)
    assert size.bytes_moved("topk_mask") / 1e6 == pytest.approx(0.8, rel=0.02)
    assert size.bytes_moved("gather_tokens") / 1e6 == pytest.approx(62 + 124, rel=0.02)
    assert size.bytes_moved("masked_mse forward") / 1e6 == pytest.approx(276, rel=0.02)
    assert size.bytes_moved("masked_mse backward") / 1e6 == pytest.approx(460, rel=0.02)


def test_kernels_run_through(results: Path) -> None:
    kernels.run(kernels.Options(rounds=1, batches=(1,), ratios=(0.9,), repeats=1, copy_mib=8))
    report = read_report(results, "kernels")
    assert [table["title"] for table in report["tables"]] == list(OPERATIONS)
    for table in report["tables"]:
        (copy,) = [row for row in table["rows"] if row["name"] == COPY]
        assert table["limit"] == copy["median"]
        for row in table["rows"]:
            assert row["MB moved"] / row["µs"] == pytest.approx(row["median"] / 1000)
            if row["name"].endswith("reference"):
                assert row["× reference"] == 1


def test_launches_worth_trying_begin_with_the_default() -> None:
    model = ModelConfig()
    warps = [1, 2, 4, 8]
    assert kernel_tuning.launches("topk_mask", model) == [Launch(256, number) for number in warps]
    assert kernel_tuning.launches("masked_mse forward", model) == [Launch(512, number) for number in warps]
    for operation in ("gather_tokens", "masked_mse backward"):
        tried = kernel_tuning.launches(operation, model)
        assert tried[0] == block_of_values(model.values_per_token) == Launch(2048, 4)
        assert len(tried) == len(set(tried)) == 4 + 4 + 3


@pytest.mark.slow
def test_tuning_checks_and_times_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU Triton's interpreter runs, whose times mean nothing."""
    few = [Launch(512, 1), Launch(512, 2), Launch(128, 1)]
    monkeypatch.setattr(kernel_tuning, "launches", lambda operation, model: few)
    check = kernel_tuning.check

    def fail(operation: str, inputs: Inputs, launch: Launch) -> None:
        assert launch.num_warps == 1, "another result"
        check(operation, inputs, launch)

    monkeypatch.setattr(kernel_tuning, "check", fail)
    size = Size("tiny", TINY, batch=1, ratio=0.6, dtype=torch.bfloat16)
    tuned = list(kernel_tuning.tune(size, rounds=1, repeats=1, copy_mib=1, device=DEVICE))
    assert [table.title for table, _ in tuned] == [f"{operation}, tiny" for operation in OPERATIONS]
    for table, best in tuned:
        assert {row.name for row in table.rows} == {"block 512, 1 warp", "block 128, 1 warp"}
        assert [row.facts[""] for row in table.rows if row.name == table.relative_to] == ["default"]
        assert table.note == "block 512, 2 warps is left out: another result"
        medians = [row.values[0] for row in table.rows]
        assert medians == sorted(medians)
        assert best.startswith(f"fastest is {table.rows[0].name}, ")


@pytest.mark.slow
def test_a_launch_that_changes_the_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size("tiny", TINY, batch=1, ratio=0.6, dtype=torch.bfloat16)
    inputs = Inputs(size, DEVICE)
    for operation in OPERATIONS:
        kernel_tuning.check(operation, inputs, Launch(512, 2))
    with pytest.raises(AssertionError):  # the block is smaller than a slot
        kernel_tuning.check("topk_mask", inputs, Launch(8, 1))
    right = inputs.operation("gather_tokens", False)()
    assert isinstance(right, torch.Tensor)
    monkeypatch.setattr(kernel_operations, "gather_tokens_kernel", lambda *_, **__: right * 1.02)
    with pytest.raises(AssertionError, match="not close"):
        kernel_tuning.check("gather_tokens", inputs, Launch(512, 2))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="has a GPU")
def test_tuning_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        kernel_tuning.run(kernel_tuning.Options())
