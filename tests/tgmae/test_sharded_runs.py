"""Runs whose two processes share the network (--parallel fsdp), against one process that has all of it."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import ForkedCommand, places_of_two
from tests.support.runs import command, losses, run_here, validation_losses, wait_for_step
from tgmae.model.huggingface import read_step
from tgmae.model.sharded_files import read_header, read_tensors
from tgmae.training.checkpoints.folder import newest_checkpoint

FLAGS = (
    "--pipeline", "pyav", "--epochs", "4", "--max-steps", "12", "--log.checkpoint-every", "4",
    "--log.keep-checkpoints", "2", "--device-batch-size", "2", "--optim.warmup-epochs", "1", "--optim.base-lr", "0.05",
    "--loss.contrastive", "0.5", "--loss.contrast-over", "step", "--parallel", "fsdp", "--activation-checkpointing",
    "--validation.every", "3", "--validation.clips", "1",
)  # fmt: skip


def start_two(arguments: list[str], folder: Path) -> list[ForkedCommand]:
    """Start the two processes of a run as torchrun would, with their output in `folder`."""
    return [ForkedCommand(arguments, folder / f"rank_{place['RANK']}.log", **place) for place in places_of_two()]


def finish(arguments: list[str], folder: Path) -> str:
    processes = start_two(arguments, folder)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs[0]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    shapes = read_header(checkpoint)["tensors"]
    into = {name: torch.empty_like(one, device="cpu") for name, one in shapes.items()}
    read_tensors(checkpoint, into)
    return into


@pytest.mark.slow
def test_two_that_share_train_like_one_and_resume_each_other(shapes: Path, tmp_path: Path) -> None:
    """Killed and resumed by two, bit for bit; by one, or after one, up to rounding. With a contrastive head."""
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    run_here(command(shapes, one, *FLAGS))
    assert newest_checkpoint(one / "checkpoints").name == "step_00000012.pt"  # type: ignore[union-attr]  # nobody to share
    said = finish(command(shapes, two, *FLAGS), tmp_path)
    assert "shared by 2 processes, activation checkpointing" in said
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    # With one clip to validate on, one of two processes has none.
    assert validation_losses(two) == pytest.approx(validation_losses(one), rel=1e-4)
    last = two / "checkpoints" / "step_00000012.dcp"
    assert sorted(path.name for path in (two / "checkpoints").iterdir()) == ["step_00000008.dcp", last.name]
    assert not list(two.rglob("*.tmp"))

    # One of two is killed, and the other ends. The same command goes on.
    processes = start_two(command(shapes, killed, *FLAGS), tmp_path)
    wait_for_step(killed, 6, processes[0])
    processes[1].kill()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL], outputs
    assert "Traceback" not in outputs[0]
    assert "resuming from" in finish(command(shapes, killed, *FLAGS), tmp_path)
    whole, resumed = tensors(last), tensors(killed / "checkpoints" / "step_00000012.dcp")
    assert whole.keys() == resumed.keys()
    assert {"model.head.last.weight", "optimizer.mae.head.weight.exp_avg"} <= whole.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())

    # 2 → 1 and 1 → 2, from step 8; and what a killed run owes is exported by two.
    shutil.rmtree(last)
    (one / "checkpoints" / "step_00000012.pt").unlink()
    shutil.copytree(one, tmp_path / "one-two")
    shutil.copytree(two, tmp_path / "two-one")
    assert "step_00000008.pt" in finish(command(shapes, tmp_path / "one-two", *FLAGS), tmp_path)
    run_here(command(shapes, tmp_path / "two-one", *FLAGS))
    shutil.rmtree(killed / "hf")
    assert "the results of step 12 were missing" in finish(command(shapes, killed, *FLAGS), tmp_path)
    expected = load_file(one / "hf" / "model.safetensors")
    for run in (two, killed, tmp_path / "one-two", tmp_path / "two-one"):
        exported = load_file(run / "hf" / "model.safetensors")
        assert exported.keys() == expected.keys()
        assert read_step(run / "hf") == 12
        for name, weight in expected.items():
            torch.testing.assert_close(exported[name], weight, rtol=1e-3, atol=1e-4)
