"""The student: it learns, it is kept with what it was made from, and a killed distillation loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from dali_pipelines.pyav_pipeline import PyavPipeline
from dali_pipelines.types import ClipBatch, ClipPipeline
from engines.clip_model import load_clip
from engines.config import CLIPConfig
from engines.towers.clip_towers import StudentTower
from engines.towers.student import load_student, read_about, save_student
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.config.training import DistillConfig
from tgmae.data.manifest import read_manifest
from tgmae.data.sampling import ClipSampler
from tgmae.masks.scorer import bind_scorer, make_scorer
from tgmae.training import distillation, loader
from tgmae.training.distillation import Distillation, distill, split_rows
from tgmae.training.process import Stopped

REPOSITORY = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
OPTIONS = DistillConfig(hidden=128, rounds=6, clips=4, batch=48, check_clips=4)


@pytest.fixture
def tower() -> StudentTower:
    torch.manual_seed(0)
    return StudentTower(8, 32, 16)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# The network and its file


def test_student_gives_unit_vectors_by_a_plain_network(tower: StudentTower) -> None:
    patches = torch.randn(5, 8 * 8 * 3, generator=torch.Generator().manual_seed(1))
    x = patches.double().numpy()
    first, _, second, _, last = tower.layers
    for place, layer in enumerate((first, second, last)):
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()  # type: ignore[union-attr]
        if place < 2:
            x = x * torch.special.ndtr(torch.from_numpy(x)).numpy()  # GELU
    expected = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(tower(patches).detach().numpy(), expected, rtol=0, atol=1e-5)


def test_file_brings_the_network_back(tower: StudentTower, tmp_path: Path) -> None:
    """Bit for bit, with what was measured; two students have two names, the same one has one."""
    path = tmp_path / "deep" / "student.safetensors"
    save_student(path, tower, "a" * 16, {"agreement": 0.5})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    back = load_student(path, "a" * 16, 8)
    patches = torch.randn(3, 192)
    assert torch.equal(back(patches), tower(patches))
    assert (back.input_shape, back.name[:12]) == ((192,), "student8-32-")
    assert read_about(path) == {"clip": "a" * 16, "values": 192, "hidden": 32, "embed": 16,
                                "measured": {"agreement": 0.5}}  # fmt: skip
    assert load_student(path, "a" * 16, 8).name == back.name
    with torch.no_grad():
        tower.layers[0].bias[0] += 1  # type: ignore[index,operator,union-attr]
    save_student(path, tower, "a" * 16, {})
    assert load_student(path, "a" * 16, 8).name != back.name


def test_what_does_not_fit_is_refused(tower: StudentTower, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    save_student(path, tower, "a" * 16, {})
    with pytest.raises(ValueError, match=rf"distilled from the CLIP {'a' * 16}, but .* give {'b' * 16}; distill it"):
        load_student(path, "b" * 16, 8)
    with pytest.raises(ValueError, match=r"takes patches of 192 values, got patches of 768"):
        load_student(path, "a" * 16, 16)


def test_what_is_no_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no student at .*; make one with: tgmae-engine distill"):
        load_student(tmp_path / "nothing", "a", 8)
    for name, content in {"empty": b"", "text": b"hello, I am no network" * 9}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not a student made by tgmae-engine distill"):
            load_student(tmp_path / name, "a", 8)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other is not a student made by tgmae-engine distill"):
        load_student(tmp_path / "other", "a", 8)


# Learning


def test_distillation_lowers_its_loss_and_learns_the_order(tower: StudentTower) -> None:
    """A fixed nonlinear teacher: the loss falls, and cosines with a text not trained on follow the teacher's."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(192, 24, generator=generator) / 14, torch.randn(24, 16, generator=generator)]
    patches = torch.randn(512, 192, generator=generator)
    wanted = F.normalize(torch.tanh(patches @ weights[0]) @ weights[1], dim=-1)
    fit = Distillation(tower, unit(5, 16), num_steps=200, learning_rate=3e-3)
    new_text = unit(16, seed=9)

    def correlation() -> float:
        with torch.inference_mode():
            return float(np.corrcoef(tower(patches) @ new_text, wanted @ new_text)[0, 1])

    before = correlation()
    losses = [fit.update(patches[rows], wanted[rows]) for _ in range(50) for rows in split_rows(512, 128, generator)]
    assert fit.step == 200
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:5])
    assert before < 0.5
    assert correlation() > 0.8
    # Half a cosine from the rate asked for down to nothing.
    assert fit.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_loss_is_what_it_says(tower: StudentTower) -> None:
    """Squared error of centred cosines in units of the teacher's spread, plus one minus the cosine; in float64."""
    texts, wanted = unit(5, 16), unit(20, 16, seed=4)
    patches = torch.randn(20, 192, generator=torch.Generator().manual_seed(5))
    given = tower(patches).detach().double().numpy()
    loss = Distillation(tower, texts, 10, 1e-3).update(patches, wanted)
    theirs, ours = (x @ texts.double().numpy().T for x in (wanted.double().numpy(), given))
    spread = theirs.std(0, ddof=1)
    error = ((theirs - theirs.mean(0)) / spread - (ours - ours.mean(0)) / spread) ** 2
    expected = error.mean() + (1 - (given * wanted.double().numpy()).sum(1)).mean()
    assert loss == pytest.approx(expected, rel=1e-4)


def test_going_on_from_a_state_changes_nothing(tower: StudentTower) -> None:
    """Ten steps at once, and five and five through a state on disk's types: the same weights bit for bit."""
    patches, wanted, texts = torch.randn(40, 192), unit(40, 16), unit(3, 16)
    results = []
    for interrupted in (False, True):
        torch.manual_seed(1)
        fit = Distillation(StudentTower(8, 32, 16), texts, 10, 1e-3)
        for step in range(10):
            if interrupted and step == 5:
                state, fit = fit.state(), Distillation(StudentTower(8, 32, 16), texts, 10, 1e-3)
                fit.load_state(state)
            fit.update(patches[4 * step : 4 * step + 4], wanted[4 * step : 4 * step + 4])
        results.append((fit.step, *fit.tower.state_dict().values()))
    assert results[0][0] == results[1][0] == 10
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def test_rows_come_once_in_full_groups() -> None:
    groups = list(split_rows(10, 3, torch.Generator().manual_seed(0)))
    assert [len(group) for group in groups] == [3, 3, 3]
    assert len({int(row) for group in groups for row in group}) == 9
    assert torch.cat(groups).tolist() != sorted(torch.cat(groups).tolist())


# The command's work, on shapes clips


def config(manifest: Path, cache_dir: Path) -> InputConfig:
    return InputConfig(
        device="cpu",
        data=DataConfig(manifest=manifest, stride=4, num_workers=1),
        model=ModelConfig(image_size=96, num_frames=8),
        mask=MaskConfig(frames_per_tubelet=1),
        clip=CLIPConfig(model="shapes", cache_dir=cache_dir),
    )


def run(manifest: Path, out: Path, cache_dir: Path, **options: float) -> dict[str, Any]:
    """`distill` on the training rows, measured on the others."""
    rows = [read_manifest(manifest).select_split(split) for split in ("train", "val")]
    return distill(config(manifest, cache_dir), *rows, out, replace(OPTIONS, **options), CPU)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def student(shapes: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    run(shapes, path, cache_dir)
    return path


@pytest.mark.slow
def test_measured_agreement_is_in_the_file_and_true(shapes: Path, cache_dir: Path, student: Path) -> None:
    """Counted again with sets, on the first clips that training would draw of the held-out rows."""
    with safe_open(student, "pt") as file:
        measured = json.loads(file.metadata()["tgmae_student"])["measured"]
    steps = OPTIONS.rounds * (OPTIONS.clips * 4 * 36 // OPTIONS.batch)
    assert (measured["steps"], measured["patches"]) == (steps, steps * OPTIONS.batch)
    assert (measured["ratio"], measured["check_clips"]) == (0.6, 4)
    plain = config(shapes, cache_dir)
    held_out = read_manifest(shapes).select_split("val")
    plan = ClipSampler(manifest=held_out, data=plain.data, num_frames=8, batch_size=4, seed=0)
    clips = PyavPipeline(held_out, plan, 96).next_batch()
    tops = []
    for mask in (plain.mask, replace(plain.mask, scorer="student", student=student)):
        scores = bind_scorer(replace(plain, mask=mask), held_out, CPU)(clips)
        tops.append([set(row.topk(21).indices.tolist()) for row in scores.flatten(0, 1)])
    shares = [len(a & b) / 21 for a, b in zip(*tops, strict=True)]
    assert measured["agreement"] == pytest.approx(np.mean(shares), abs=1e-6)
    assert measured["agreement_p5"] == pytest.approx(np.quantile(shares, 0.05), abs=1e-6)
    assert -1 <= measured["rank_correlation"] <= 1


@pytest.mark.slow
def test_seconds_of_distilling_agree_better_than_chance(shapes: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Chance agrees on 21/36 = .58 and correlates with nothing."""
    options = {"hidden": 256, "rounds": 40, "batch": 96, "check_clips": 16, "learning_rate": 2e-3}
    measured = run(shapes, tmp_path / "student.safetensors", cache_dir, **options)
    assert measured["agreement"] > 0.62
    assert measured["rank_correlation"] > 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]


KILLED_AFTER_SAVING = """
import os, signal, sys
from pathlib import Path
import tgmae.training.distillation as distillation
from tests.tgmae.training.test_distillation import run
distillation._SAVE_EVERY = 2
save, saved = distillation._save_state, []
def save_and_die_in_the_next(path, state):
    if saved:
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, state)
    saved.append(path)
distillation._save_state = save_and_die_in_the_next
if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(
    shapes: Path, cache_dir: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after four of six rounds, of which two were saved: the file comes out bit for bit as uninterrupted."""
    out = tmp_path / "student.safetensors"
    arguments = [sys.executable, "-c", KILLED_AFTER_SAVING, str(shapes), str(out), str(cache_dir)]
    killed = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=180, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors.partial"]
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tmp_path / "student.safetensors.partial", other)
    capsys.readouterr()
    run(shapes, out, cache_dir)
    assert "resuming from" in capsys.readouterr().out
    assert out.read_bytes() == student.read_bytes()
    assert not (tmp_path / "student.safetensors.partial").exists()
    # With other settings the state is not used.
    run(shapes, other / "student.safetensors", cache_dir, rounds=1)
    assert "resuming from" not in capsys.readouterr().out
    assert read_about(other / "student.safetensors")["measured"]["steps"] == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_is_named(
    shapes: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    patches = distillation._patches

    def interrupted(*arguments: Any) -> torch.Tensor:
        os.kill(os.getpid(), number)
        return patches(*arguments)

    monkeypatch.setattr(distillation, "_patches", interrupted)
    words = rf"^stopped by {number.name} after round 1; the same command resumes from there$"
    with pytest.raises(Stopped, match=words) as stopped:
        run(shapes, tmp_path / "student.safetensors", cache_dir)
    assert stopped.value.number == number
    assert (tmp_path / "student.safetensors.partial").exists()


def test_a_signal_saves_while_no_input_comes(
    shapes: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a network file never comes."""
    opened, is_interrupted = distillation.open_pipeline, threading.Event()

    def open_stalling(*arguments: Any) -> ClipPipeline:
        pipeline = opened(*arguments)
        next_batch = pipeline.next_batch

        def stall() -> ClipBatch:
            os.kill(os.getpid(), signal.SIGTERM)
            assert is_interrupted.wait(60)
            raise ValueError("interrupted")

        batches = iter([next_batch, stall])
        monkeypatch.setattr(pipeline, "next_batch", lambda: next(batches)())
        monkeypatch.setattr(pipeline, "interrupt", is_interrupted.set)
        return pipeline

    monkeypatch.setattr(distillation, "open_pipeline", open_stalling)
    monkeypatch.setattr(loader, "_STOPPING_S", 1)
    words = r"^stopped by SIGTERM after round 1, as no input came; the same command resumes from there$"
    with pytest.raises(Stopped, match=words):
        run(shapes, tmp_path / "student.safetensors", cache_dir)
    assert distillation._load_state(tmp_path / "student.safetensors.partial")["step"] == 12


@pytest.mark.slow
def test_a_finished_student_is_not_distilled_again(
    shapes: Path, cache_dir: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what is measured on other clips is measured again; other settings say that they replace it."""
    out = Path(shutil.copy(student, tmp_path))
    before = out.read_bytes()
    assert run(shapes, out, cache_dir) == read_about(student)["measured"]
    assert capsys.readouterr().out.startswith(f"nothing to do: {out} was distilled with these settings; remove it to")
    assert out.read_bytes() == before
    measured = run(shapes, out, cache_dir, check_clips=2)
    assert (measured["check_clips"], measured["steps"]) == (2, read_about(student)["measured"]["steps"])
    clip = read_about(out)["clip"]
    assert load_student(out, clip, 16).name == load_student(student, clip, 16).name
    run(shapes, out, cache_dir, rounds=1)
    assert f"{out} was distilled with other settings, and will be replaced" in capsys.readouterr().out
    assert read_about(out)["measured"]["steps"] == 12


def test_another_file_is_not_replaced_by_a_student(shapes: Path, cache_dir: Path, tmp_path: Path) -> None:
    out = Path(shutil.copy(shapes, tmp_path))
    with pytest.raises(ValueError, match=r"manifest\.parquet is not a student made by tgmae-engine distill"):
        run(shapes, out, cache_dir)
    assert out.read_bytes() == shapes.read_bytes()


@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "other"])
def test_a_damaged_state_is_refused_and_kept(shapes: Path, cache_dir: Path, tmp_path: Path, damage: str) -> None:
    partial = tmp_path / "student.safetensors.partial"
    torch.save({"settings": "x", "step": torch.zeros(500)}, partial)
    whole = partial.read_bytes()
    place = whole.index(bytes(2000)) + 999
    flipped = whole[:place] + b"\1" + whole[place + 1 :]
    partial.write_bytes({"empty": b"", "cut": whole[:900], "flip": flipped, "other": whole}[damage])
    words = {
        "flip": r"cannot be read: its entry .* is damaged \(wrong checksum\)",
        "other": "is not a state of tgmae-engine distill",
    }
    with pytest.raises(ValueError, match=rf"partial {words.get(damage, 'cannot be read: .+')}; remove it to distill"):
        run(shapes, tmp_path / "student.safetensors", cache_dir)
    assert partial.exists()


def test_a_full_disk_is_said_with_the_file(tmp_path: Path) -> None:
    """A limit of this process stands for the disk: torch's own writer raises a RuntimeError of its zip code then."""
    import resource

    from tgmae.training.distillation import _save_state

    path = tmp_path / "student.safetensors.partial"
    _save_state(path, {"step": 1})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"partial could not be written: File too large; the same command resumes"):
            _save_state(path, {"weight": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_fewer_patches_than_a_batch(shapes: Path, cache_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a round has 576 patches, fewer than --batch 1000; lower it"):
        run(shapes, tmp_path / "student.safetensors", cache_dir, batch=1000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["hidden", "rounds", "clips", "batch", "check_clips"])
def test_options_start_at_one(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name.replace('_', '-')} must be at least 1, got 0"):
        DistillConfig(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_scorer_refuses_a_student_for_other_patches(shapes: Path, cache_dir: Path, student: Path) -> None:
    held_out = read_manifest(shapes)
    mask = MaskConfig(scorer="student", student=student)
    small = replace(config(shapes, cache_dir), mask=mask, model=ModelConfig(image_size=48, patch_size=8, num_frames=8))
    with pytest.raises(ValueError, match=r"takes patches of 768 values, got patches of 192"):
        make_scorer(small, held_out, CPU)
    assert read_about(student)["clip"] == load_clip(CLIPConfig(model="shapes")).fingerprint
