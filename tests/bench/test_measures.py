"""The benchmarks of decoders, kernels and step: what they count is right, and each runs through at its smallest."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench.harness.report
from bench import decode, kernel_tuning, kernels, step
from bench.harness.gpu_watch import GpuWatch
from bench.rivals.decoders import DECODERS, Clip, dali_pipeline, import_decoder, rate_of_dali
from kernels.gather_tokens import gather_tokens_reference
from kernels.launch import Launch, block_of_values
from kernels.masked_mse import masked_mse_reference
from tests.support.cubes import DEVICE
from tests.support.videos import read_number, write_numbered
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.config import MaskConfig
from tgmae.model.config import ModelConfig

# Forward and backward of one clip by mask ratio, 1e9 (docs/recipes.md of the project's material).
PUBLISHED_GFLOP = {0.9: 213, 0.75: 345, 0.65: 443, 0.6: 494}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "results"
    monkeypatch.setattr(bench.harness.report, "RESULTS", folder)
    return folder


def read_report(results: Path, name: str) -> dict[str, Any]:
    (path,) = results.glob(f"{name}.*.json")
    report: dict[str, Any] = json.loads(path.read_text())
    return report


# ---- decoders -------------------------------------------------------------------------------------------------------

WINDOW = tuple(range(17, 49, 2))  # from the middle of a group of 12, over several


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Large enough for NVDEC, which takes no HEVC below 144 pixels."""
    folder = tmp_path_factory.mktemp("numbered")
    for name, options in {
        "a_h264.mp4": dict(codec="libx264", g="12", bf="2"),
        "b_vp9.webm": dict(codec="libvpx-vp9", g="12"),
        # Closed groups, as tgmae.data.compact makes them: decord 0.6 misses frames at the seams of open ones.
        "c_hevc.mp4": dict(codec="libx265", g="12", **{"x265-params": "log-level=none:open-gop=0"}),
    }.items():
        write_numbered(folder / name, num_frames=60, width=192, height=160, **options)  # type: ignore[arg-type]
    index_folder(folder, folder / "manifest.parquet")
    return read_manifest(folder / "manifest.parquet")


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "PyAV, YUV"])
def test_decoders_give_the_frames_asked_for(numbered: Manifest, name: str) -> None:
    if name != "PyAV":
        try:
            import_decoder(name)
        except (ImportError, RuntimeError, OSError) as error:
            pytest.skip(f"{name} does not import: {str(error).splitlines()[0]}")
    for row in range(len(numbered)):
        frames: Any = DECODERS[name](Clip(numbered.file(row), numbered[row], WINDOW))
        assert frames.shape == (16, 160, 192, 3)
        assert frames.dtype == np.uint8
        assert tuple(read_number(picture) for picture in frames) == WINDOW


@pytest.mark.parametrize(("on_gpu", "rows"), [(False, [1]), pytest.param(True, [0, 1, 2], marks=pytest.mark.gpu)])
def test_dali_gives_the_frames_asked_for(
    numbered: Manifest, on_gpu: bool, rows: list[int], request: pytest.FixtureRequest
) -> None:
    """On a CPU VP9 only."""
    if on_gpu:
        request.getfixturevalue("nvdec")
    windows = (WINDOW, tuple(frame - 10 for frame in WINDOW), (3, 4, 59))
    for row in rows:
        clips = [Clip(numbered.file(row), numbered[row], window) for window in windows]
        (decoded,) = dali_pipeline(clips, batch=3, num_threads=1, on_gpu=on_gpu).run()
        frames = decoded.as_cpu() if on_gpu else decoded
        for place, window in enumerate(windows):
            assert tuple(read_number(picture) for picture in np.asarray(frames.at(place))) == window


def test_several_dali_pipelines_decode_at_once(numbered: Manifest) -> None:
    """Clips that do not divide by the pipelines, more pipelines than clips, and one that cannot be decoded."""
    clips = [Clip(numbered.file(1), numbered[1], tuple(range(first, first + 4))) for first in range(3)]
    for pipelines in (1, 2, 4):
        begun: list[float] = []
        rate = rate_of_dali(clips, False, 0, 1, pipelines, lambda begun=begun: begun.append(time.perf_counter()))  # type: ignore[misc]
        assert len(begun) == 1
        assert rate > 0
    h264 = Clip(numbered.file(0), numbered[0], (0, 1))
    with pytest.raises(RuntimeError, match=r"(?i)codec|decoder"):
        rate_of_dali([*clips, h264], False, 0, 1, 2)


def test_a_watch_forgets_what_came_before(tmp_path: Path) -> None:
    file = tmp_path / "smi.csv"
    watch = GpuWatch(file)
    watch.forget()
    assert watch.read() == {}
    file.write_text("10, 50, 1000\n")
    watch.forget()
    with file.open("a") as more:
        more.write("30, 80, 3000\n")
    assert watch.read()["utilization.decoder, mean"] == 80


def test_frames_passed_are_counted_from_the_keyframe(numbered: Manifest) -> None:
    h264 = numbered[0]
    assert h264.keyframes[:3] == (0, 12, 24)
    for first, last, passed in ((17, 47, 36), (12, 42, 31), (0, 0, 1), (11, 12, 13)):
        assert Clip("", h264, (first, last)).frames_passed == passed


def test_decode_runs_through(numbered: Manifest, tmp_path: Path, results: Path) -> None:
    manifest = numbered.root / "manifest.parquet"
    decode.run(decode.Options(manifest, videos=1, clips=2, seconds=0, rounds=1, workers=(1,), work_dir=tmp_path))
    report = read_report(results, f"decode.{numbered.root.name}")
    codecs, turns, keyframes, sizes, workers = report["tables"]
    for table in (codecs, keyframes, sizes, workers):
        for row in table["rows"]:
            assert row["median"] > 0
            assert row["frames/s"] == pytest.approx(row["median"] * row["frames a clip"])
            assert 31 <= row["frames a clip"] <= 60  # a window of 16 frames, stride 2; videos of 60 frames
    assert names(codecs) >= {f"{codec}: {decoder}" for codec in decode.CODECS for decoder in ("PyAV", "PyAV, YUV")}
    assert "vp9: DALI CPU" in names(codecs)
    assert "h264: DALI CPU" not in names(codecs)
    passed = [next(row for row in keyframes["rows"] if row["name"] == f"every {gop}: PyAV") for gop in decode.GOPS]
    assert [row["frames a clip"] for row in passed] == sorted(row["frames a clip"] for row in passed)
    assert names(sizes) >= {"short side 160: PyAV", "short side 128: PyAV", "as it came (h264): PyAV"}
    assert names(workers) >= {"h264, 1: PyAV", "vp9, 1: DALI CPU"}
    if not torch.cuda.is_available():
        assert names(turns) == {
            "1 pipeline × 1 thread", "1 pipeline × 2 threads", "2 pipelines × 1 thread", "2 pipelines × 2 threads"
        }  # fmt: skip
    assert all(row["frames/s"] > row["median"] > 0 for row in turns["rows"])


def test_tables_in_the_order_asked_for(
    numbered: Manifest, tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what they need is encoded; a pair that fails, at once or later, is named and the others go on."""

    def rate(
        clips: Any, on_gpu: bool, seconds: float, threads: int, pipelines: int = 1, begin: Any = None,
        batch: int | None = None,
    ) -> float:  # fmt: skip
        if (pipelines, threads) == (1, 4) or (pipelines == 2 and batch is None):
            raise RuntimeError("no decoder left\nstack")
        return 10.0

    monkeypatch.setattr(decode, "rate_of_dali", rate)
    monkeypatch.setattr(decode, "PAIRS_ON_CPU", decode.PAIRS_ON_GPU)
    manifest = numbered.root / "manifest.parquet"
    options = decode.Options(manifest, tables=("turns", "codec"), videos=1, clips=2, seconds=0, rounds=1, workers=(1,))
    decode.run(replace(options, work_dir=tmp_path))
    turns, codecs = read_report(results, f"decode.{numbered.root.name}")["tables"]
    assert turns["title"].startswith("By pipelines")
    assert codecs["title"].startswith("By codec")
    made = {path.name for path in (tmp_path / numbered.root.name).iterdir()}
    assert made == {f"{codec}-160-gop12" for codec in decode.CODECS}
    assert [row["name"] for row in turns["rows"]] == [
        "1 pipeline × 1 thread", "1 pipeline × 16 threads", "4 pipelines × 4 threads", "7 pipelines × 2 threads",
        "8 pipelines × 4 threads", "1 pipeline × 2 threads",
    ]  # fmt: skip
    for pair in ("1 pipeline × 4 threads", "2 pipelines × 8 threads"):
        assert f"{pair} is left out: no decoder left\n" in turns["note"] + "\n"


def test_every_codec_takes_its_turns(numbered: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first by every pair, the others by one thread and by what training takes."""
    manifest, seen = numbered.root / "manifest.parquet", list[tuple[str, int, int]]()

    def rate(clips: Any, on_gpu: bool, seconds: float, threads: int, pipelines: int, *rest: Any) -> float:
        seen.append((clips[0].video.codec, pipelines, threads))
        return 10.0

    monkeypatch.setattr(decode, "rate_of_dali", rate)
    made = decode.Bench(decode.Options(manifest, videos=1, clips=2, seconds=0, rounds=1, work_dir=tmp_path))
    made.decoding = replace(made.decoding, pipelines=3, threads=5)
    with made.pool:
        table = made.table_of_turns([made.variant(codec, 160, 12) for codec in ("h264", "vp9")])
    others = [row.name for row in table.rows if "vp9" in row.name]
    assert others == ["1 pipeline × 1 thread, vp9-160-gop12", "3 pipelines × 5 threads, vp9-160-gop12"]
    assert len(table.rows) == len(decode.PAIRS_ON_CPU) + 3
    assert {case for case in seen if case[0] == "vp9"} == {("vp9", 1, 1), ("vp9", 3, 5)}
    assert {case for case in seen if case[0] == "h264"} == {("h264", *pair) for pair in (*decode.PAIRS_ON_CPU, (3, 5))}


def names(table: dict[str, Any]) -> set[str]:
    return {row["name"] for row in table["rows"]}


# ---- kernels --------------------------------------------------------------------------------------------------------

TINY = ModelConfig(image_size=32, num_frames=4, patch_size=8, width=32, depth=1, num_heads=2, decoder_width=32,
                   decoder_depth=1, decoder_num_heads=2)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_moved_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    size = kernels.Size("tiny", TINY, batch=3, ratio=0.6, dtype=dtype)
    inputs = kernels.Inputs(size, torch.device("cpu"))
    cube = (TINY.patch_size, TINY.tubelet_size)
    visible, masked, prediction = inputs.visible, inputs.masked, inputs.prediction
    moved = inputs.scores.nbytes + visible.nbytes + masked.nbytes
    assert size.bytes_moved("topk_mask") == moved

    tokens = gather_tokens_reference(inputs.frames, visible, *cube, dtype, kernels.MEAN, kernels.STD)
    share = visible.shape[1] / TINY.num_tokens
    moved = round(inputs.frames.nbytes * share) + visible.nbytes + tokens.nbytes
    assert size.bytes_moved("gather_tokens") == moved

    read = round(inputs.frames.nbytes * (1 - share)) + masked.nbytes + prediction.nbytes
    saved = torch.empty(3, masked.shape[1], 3, 2)  # mean and reciprocal deviation, as masked_mse.py keeps them
    sums = torch.empty(3, masked.shape[1])
    assert size.bytes_moved("masked_mse forward") == read + saved.nbytes + sums.nbytes
    loss = masked_mse_reference(prediction, inputs.frames, masked, *cube)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert gradient.dtype == dtype
    assert size.bytes_moved("masked_mse backward") == read + saved.nbytes + gradient.nbytes


def test_production_bytes_agree_with_the_kernels_own_figures() -> None:
    """In bfloat16, 64 clips of 16×224², γ = .6; the figures are those of the kernels' docstrings."""
    size = kernels.Size("", ModelConfig(), batch=64, ratio=0.6, dtype=torch.bfloat16)
    assert size.bytes_moved("topk_mask") / 1e6 == pytest.approx(0.8, rel=0.02)
    assert size.bytes_moved("gather_tokens") / 1e6 == pytest.approx(62 + 124, rel=0.02)
    assert size.bytes_moved("masked_mse forward") / 1e6 == pytest.approx(276, rel=0.02)
    assert size.bytes_moved("masked_mse backward") / 1e6 == pytest.approx(460, rel=0.02)


def test_kernels_run_through(results: Path) -> None:
    kernels.run(kernels.Options(rounds=1, batches=(1,), ratios=(0.9,), repeats=1, copy_mib=8))
    report = read_report(results, "kernels")
    assert [table["title"] for table in report["tables"]] == list(kernels.OPERATIONS)
    for table in report["tables"]:
        (copy,) = [row for row in table["rows"] if row["name"] == kernels.COPY]
        assert table["limit"] == copy["median"]
        for row in table["rows"]:
            assert row["MB moved"] / row["µs"] == pytest.approx(row["median"] / 1000)
            if row["name"].endswith("reference"):
                assert row["× reference"] == 1


def test_launches_worth_trying_begin_with_todays() -> None:
    model = ModelConfig()
    warps = [1, 2, 4, 8]
    assert kernel_tuning.launches("topk_mask", model) == [Launch(256, number) for number in warps]
    assert kernel_tuning.launches("masked_mse forward", model) == [Launch(512, number) for number in warps]
    for operation in ("gather_tokens", "masked_mse backward"):
        tried = kernel_tuning.launches(operation, model)
        assert tried[0] == block_of_values(model.values_per_token) == Launch(2048, 4)
        assert len(tried) == len(set(tried)) == 4 + 4 + 3


def test_tuning_checks_and_times_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter on a CPU: the times mean nothing."""
    few = [Launch(512, 1), Launch(512, 2), Launch(128, 1)]
    monkeypatch.setattr(kernel_tuning, "launches", lambda operation, model: few)
    check = kernel_tuning.check

    def fail(operation: str, inputs: kernels.Inputs, launch: Launch) -> None:
        assert launch.num_warps == 1, "another result"
        check(operation, inputs, launch)

    monkeypatch.setattr(kernel_tuning, "check", fail)
    size = kernels.Size("tiny", TINY, batch=1, ratio=0.6, dtype=torch.bfloat16)
    tuned = list(kernel_tuning.tune(size, rounds=1, repeats=1, copy_mib=1, device=DEVICE))
    assert [table.title for table, _ in tuned] == [f"{operation}, tiny" for operation in kernels.OPERATIONS]
    for table, best in tuned:
        assert {row.name for row in table.rows} == {"block 512, 1 warp", "block 128, 1 warp"}
        assert [row.facts[""] for row in table.rows if row.name == table.relative_to] == ["now"]
        assert table.note == "block 512, 2 warps is out: another result"
        medians = [row.values[0] for row in table.rows]
        assert medians == sorted(medians)
        assert best.startswith(f"best is {table.rows[0].name}, ")


def test_a_launch_that_changes_the_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    size = kernels.Size("tiny", TINY, batch=1, ratio=0.6, dtype=torch.bfloat16)
    inputs = kernels.Inputs(size, DEVICE)
    for operation in kernels.OPERATIONS:
        kernel_tuning.check(operation, inputs, Launch(512, 2))
    with pytest.raises(AssertionError):  # too small for a slot
        kernel_tuning.check("topk_mask", inputs, Launch(8, 1))
    right = inputs.operation("gather_tokens", False)()
    assert isinstance(right, torch.Tensor)
    monkeypatch.setattr(kernels, "gather_tokens_kernel", lambda *_, **__: right * 1.02)
    with pytest.raises(AssertionError, match="not close"):
        kernel_tuning.check("gather_tokens", inputs, Launch(512, 2))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="has a GPU")
def test_tuning_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="this needs a CUDA device"):
        kernel_tuning.run(kernel_tuning.Options())


# ---- training step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", PUBLISHED_GFLOP)
def test_counted_arithmetic_agrees_with_the_published(ratio: float) -> None:
    """The published figures embed every patch, and decode the visible ones to the end; this model does neither."""
    model = ModelConfig()
    num_masked = MaskConfig(ratio=ratio).masked_per_slot(model.patches_per_slot) * model.num_slots
    embedded = 2 * num_masked * model.values_per_token * model.width
    width, tokens = model.decoder_width, model.num_tokens
    decoded = (tokens - num_masked) * (20 * width**2 + 4 * tokens * width)  # query, output, MLP; attention
    spared = 3 * (embedded + decoded) / 1e9
    assert step.count_gflop(model, ratio) + spared == pytest.approx(PUBLISHED_GFLOP[ratio], rel=0.005)


def test_peaks_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    for name, peak in {
        "NVIDIA H200": 989, "NVIDIA H200 NVL": 835, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA B200": None, "Tesla T4": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert step.peak_tflops(device) == peak
    assert step.peak_tflops(torch.device("cpu")) is None


@pytest.mark.skipif(DEVICE.type == "cuda", reason="has a GPU")
def test_modes_need_a_gpu(results: Path) -> None:
    with pytest.raises(ValueError, match="--modes needs a CUDA device"):
        step.run(step.Options(modes=("graph", "compiled")))
    assert not results.exists()


def test_step_runs_through(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.PRESETS, "demo", replace(step.PRESETS["demo"], batch_size=2, device_batch_size=2))
    step.run(step.Options(rounds=1, steps=1, ratios=(0.9, 0.6), large=False))
    report = read_report(results, "step")
    (table,) = report["tables"]
    *rows, matmul = table["rows"]
    assert len(rows) == 2
    assert table["limit"] == matmul["median"] > 0
    for row in rows:
        assert row["median"] == pytest.approx(row["clips/s"] * row["GFLOP a clip"] / 1000)
        assert row["ms a step"] == pytest.approx(2 / row["clips/s"] * 1000)
        shares = [float(row[stage].rstrip("%")) for stage in ("forward", "backward", "optimizer")]
        assert 20 < sum(shares) <= 102  # the rest: the gradient's norm; rounded to whole percents
