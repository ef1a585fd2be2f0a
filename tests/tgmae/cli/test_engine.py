"""tgmae-engine as a user meets it: export, build and check."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import engines.patch_similarity
from engines.backends.onnx_engine import OnnxEngine
from engines.backends.tensorrt_plan import load_library
from engines.clip_model import load_clip
from engines.config import CLIPConfig
from engines.patch_similarity import make_patch_similarity
from tests.support.clip_models import save_small_clip
from tgmae.cli.engine import COMMANDS, main
from tgmae.cli.tower import TowerCommand
from tgmae.data.indexing import index_folder
from tgmae.training.process import Stopped

Console = Callable[..., tuple[Any, str, str]]
PATCH = ("--patch-size", "8")
SMALL = ("--height", "32", "--width", "32", *PATCH)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags that name a small CLIP and a cache shared by this file's tests."""
    folder = tmp_path_factory.mktemp("clip")
    save_small_clip(folder / "model", layers=2)
    return "--clip.model", str(folder / "model"), "--clip.cache-dir", str(folder / "cache")


@pytest.fixture
def tgmae_engine(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Console:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["tgmae-engine", *map(str, arguments)])
        capfd.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as leave:
            code = leave.code
        out, err = capfd.readouterr()
        return code, out, err

    return run


def only_says_what_is_made(err: str) -> bool:
    """What another test of this file has made already is not named again."""
    return all(line.startswith(("tgmae: exporting ", "tgmae: building ")) for line in err.splitlines())


def cache_of(clip: tuple[str, ...]) -> Path:
    return Path(clip[3])


# export


@pytest.mark.slow
def test_export_tells_what_it_wrote(tgmae_engine: Console, clip: tuple[str, ...]) -> None:
    code, out, err = tgmae_engine("export", *clip, *PATCH)
    assert code == 0
    assert only_says_what_is_made(err)
    first, second = out.splitlines()
    path, facts = first.split(": ")
    assert Path(path).parent == cache_of(clip) / "onnx"
    assert Path(path).name.startswith("patch8-fp32-op23-")
    assert facts.startswith("0.")
    assert facts.endswith("nodes, 2 of them Attention")
    assert "MatMul 10" in second


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "opset"), [("auto", 23), ("fp32", 18)])
def test_export_for_tensorrt_is_what_it_can_build(
    tgmae_engine: Console, clip: tuple[str, ...], precision: str, opset: int, tmp_path: Path
) -> None:
    flags = ("--clip.engine", "tensorrt_rtx", "--clip.precision", precision, "--tower", "dense", "--out", tmp_path)
    code, out, _ = tgmae_engine("export", *clip[:2], *SMALL, *flags, "--last-block", "sclip")
    assert code == 0
    (path,) = (tmp_path / "onnx").glob("*.onnx")
    assert path.name.startswith(f"sclip8-32x32-{'fp16' if precision == 'auto' else 'fp32'}-op{opset}-")
    assert str(path) in out
    assert f"{3 if opset == 23 else 0} of them Attention" in out


@pytest.mark.slow
def test_export_takes_an_opset(tgmae_engine: Console, clip: tuple[str, ...], tmp_path: Path) -> None:
    code, out, _ = tgmae_engine("export", *clip[:2], *PATCH, "--opset", "18", "--out", tmp_path)
    assert code == 0
    (path,) = (tmp_path / "onnx").glob("*.onnx")
    assert onnx.load(path, load_external_data=False).opset_import[0].version == 18
    assert " 0 of them Attention" in out


# build


@pytest.mark.slow
def test_build_without_a_gpu(tgmae_engine: Console, clip: tuple[str, ...]) -> None:
    flags = ("--clip.engine", "tensorrt_rtx", "--clip.batch", "100", "--target", "sm80")
    code, out, err = tgmae_engine("build", *clip, *SMALL, *flags)
    assert code == 0
    assert only_says_what_is_made(err)
    first, *rest = out.splitlines()
    (plan,) = (cache_of(clip) / "plans").glob("*-b96-*.plan")  # six frames of 16 patches
    assert first.startswith(f"{plan}: ")
    assert first.endswith(f" s; tensorrt_rtx {load_library('tensorrt_rtx').__version__} for sm80")
    assert rest == [
        "batch 1 to 96, tuned for 96",
        "in  pixels float16 [batch, 192]",
        "out embeddings float16 [batch, 16]",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["patch", "dense"])
@pytest.mark.parametrize("batch", [1, 16, 4096])
def test_a_plan_is_built_for_the_batch_that_training_runs(
    tower: Any, batch: int, clip: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another batch means another plan: what build made beforehand would go unused."""
    command = TowerCommand(clip=CLIPConfig(model=clip[1], batch=batch), tower=tower, patch_size=8, height=32, width=48)
    asked: list[int] = []
    monkeypatch.setattr(
        engines.patch_similarity, "open_engine", lambda tower, config, device, batch: asked.append(batch)
    )
    loaded = load_clip(command.clip)
    make_patch_similarity(loaded, command.clip, command.spec(), 8, 32, 48, torch.device("cpu"))
    assert asked == [command.batch(command.make_tower())]


# check


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["patch", "dense"])
def test_check_finds_onnxruntime_equal(tgmae_engine: Console, clip: tuple[str, ...], shapes: Path, tower: str) -> None:
    flags = ("--clip.engine", "onnxruntime", "--tower", tower, "--device", "cpu", "--manifest", shapes, "--frames", "5")
    code, out, err = tgmae_engine("check", *clip, *SMALL, *flags)
    assert code == 0
    assert only_says_what_is_made(err)
    assert "onnxruntime in float32 on cpu against torch in float32" in out
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in out.splitlines() if line.startswith("│")}
    assert set(rows) == {"random pixels", "real clips"}
    for cells in rows.values():
        patches, mean, least, agreement, low = (float(cell) for cell in cells)
        assert patches == 5 * 16
        assert 0.99999 < least <= mean <= 1.00001
        assert min(agreement, low) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "worst"), [("bf16", 0.999), ("fp8", 0.99)])
def test_check_measures_what_a_precision_costs(
    tgmae_engine: Console, clip: tuple[str, ...], precision: str, worst: float
) -> None:
    flags = ("--clip.precision", precision, "--device", "cpu", "--min-cosine")
    code, out, _ = tgmae_engine("check", *clip[:2], *SMALL, *flags, worst)
    assert code == 0, code
    assert f"torch in {'fp8' if precision == 'fp8' else 'bfloat16'} on cpu against torch in float32" in out
    assert str(tgmae_engine("check", *clip[:2], *SMALL, *flags, 0.99999)[0]).endswith(", below --min-cosine 0.99999")


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["other", "nan"])
def test_check_fails_where_an_engine_differs(
    tgmae_engine: Console, clip: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    right = OnnxEngine.__call__

    def wrong(self: OnnxEngine, x: Tensor) -> Tensor:
        out = right(self, x)
        if len(x) > 16:  # more than one frame: a fault of the dynamic batch
            out[-1] = float("nan") if harm == "nan" else out[-1].roll(1)
        return out

    monkeypatch.setattr(OnnxEngine, "__call__", wrong)
    code, out, _ = tgmae_engine("check", *clip, *SMALL, "--clip.engine", "onnxruntime", "--device", "cpu")
    assert str(code).startswith("tgmae-engine: onnxruntime differs from torch: a cosine of ")
    assert str(code).endswith(", below --min-cosine 0.99")
    assert ("nan" in str(code)) == (harm == "nan")
    assert "random pixels" in out


@pytest.mark.slow
def test_check_leaves_out_what_cannot_be_read(
    tgmae_engine: Console, clip: tuple[str, ...], shapes: Path, tmp_path: Path
) -> None:
    videos = sorted((shapes.parent / "videos").rglob("*.mp4"))[:3]
    for place, video in enumerate(videos):
        (tmp_path / f"{place}.mp4").write_bytes(video.read_bytes())
    index_folder(tmp_path, tmp_path / "manifest.parquet", num_workers=1)
    (tmp_path / "1.mp4").write_bytes(b"broken since")
    check = ("check", *clip[:2], *SMALL, "--device", "cpu", "--manifest", tmp_path / "manifest.parquet")
    code, out, _ = tgmae_engine(*check)
    assert code == 0
    assert "left out 1.mp4: " in out
    for place in (0, 2):
        (tmp_path / f"{place}.mp4").unlink()
    code, _, _ = tgmae_engine(*check)
    assert str(code).startswith("tgmae-engine: not one of the videos of ")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("build",), "only TensorRT has plans: use --clip.engine tensorrt or tensorrt_rtx, not torch"),
        (("build", "--clip.engine", "tensorrt_rtx", "--target", "sm90"), "tensorrt_rtx 1."),
        (
            ("build", "--clip.engine", "tensorrt_rtx", "--target", "sm80"),
            "--target needs --clip.batch",
        ),
        (("export", "--clip.precision", "fp8"), "a tower is exported in float32 or float16, got torch.bfloat16: use"),
        (
            ("export", "--tower", "dense", "--height", "100"),
            "--height and --width must be multiples of --patch-size, got 100, 224 and 16",
        ),
        (("check", "--patch-size", "0"), "--patch-size must be at least 1, got 0"),
        (("check", "--patch-size", "300"), "--height 224 --width 224 hold no patch of --patch-size 300"),
        (("check", "--frames", "0"), "--frames must be at least 1, got 0"),
        (("check", "--manifest", "none.parquet"), "no manifest at none.parquet"),
        (("check", "--manifest", "none.parquet", "--width", "32"), "--manifest needs --height equal to --width"),
        (("check", "--clip.engine", "tensorrt_rtx", "--device", "cpu"), "--clip.engine tensorrt_rtx runs on CUDA only"),
        (("export", "--tower", "student"), "--tower student needs --student FILE"),
        (("export", "--clip.model", "ViT-B32"), "open_clip has no model 'ViT-B32'; did you mean ViT-B-32"),
    ],
)
def test_mistakes_are_errors_of_one_line(
    tgmae_engine: Console, clip: tuple[str, ...], arguments: tuple[str, ...], answer: str
) -> None:
    command, *flags = arguments
    code, _, _ = tgmae_engine(command, *clip[:2], *flags)
    assert str(code).startswith(f"tgmae-engine: {answer}"), code
    assert "\n" not in str(code)


def test_build_without_gpu_or_target(
    tgmae_engine: Console, clip: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, _ = tgmae_engine("build", *clip, "--clip.engine", "tensorrt_rtx")
    assert "no GPU to build for; name a target: --target sm75|" in str(code)


@pytest.mark.parametrize("arguments", [("exprot",), ("export", "--opset", "20"), ("check", "--tower", "pach")])
def test_typing_errors(tgmae_engine: Console, arguments: tuple[str, ...]) -> None:
    code, out, err = tgmae_engine(*arguments)
    assert code == 2
    assert "Traceback" not in out + err


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(("command", "engine"), [("build", "tensorrt_rtx"), ("check", "onnxruntime")])
def test_precisions_of_torch_alone(tgmae_engine: Console, command: str, engine: str, precision: str) -> None:
    code, out, err = tgmae_engine(command, "--clip.engine", engine, "--clip.precision", precision)
    assert code == 2
    said = " ".join((out + err).replace("│", " ").split())
    assert f"--clip.precision {precision} needs --clip.engine torch, got {engine}" in said


def test_build_needs_tensorrt(tgmae_engine: Console) -> None:
    code, out, _ = tgmae_engine("build", "--help")
    assert code == 0
    assert "--clip.engine {tensorrt,tensorrt_rtx}" in out
    assert "image encoder. (required)" in " ".join(out.split())
    code, _, err = tgmae_engine("build", "--clip.engine", "onnxruntime")
    assert (code, "does not accept --clip.engine onnxruntime; use tensorrt or tensorrt_rtx" in err) == (2, True)


def test_help_names_the_subcommands(tgmae_engine: Console) -> None:
    code, out, _ = tgmae_engine("--help")
    assert code == 0
    for name in ("export", "build", "check", "agree", "distill"):
        assert name in out


def test_the_signal_that_ended_a_command_is_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(command: object) -> None:
        raise Stopped(signal.SIGTERM, "stopped by SIGTERM after round 3")

    monkeypatch.setattr(COMMANDS["distill"], "run", stop)
    monkeypatch.setattr(sys, "argv", ["tgmae-engine", "distill", "manifest.parquet"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 143
    assert capsys.readouterr().err == "tgmae-engine: stopped by SIGTERM after round 3\n"
