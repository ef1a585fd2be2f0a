"""Tiny runs: their configuration, their command line, and what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tgmae.cli.train import main
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import TrainConfig
from tgmae.config.training import LogConfig, OptimConfig, ValidationConfig
from tgmae.telemetry.metrics import read_metrics
from tgmae.training.checkpoints.folder import newest_checkpoint
from tgmae.training.checkpoints.read import load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


def tiny(manifest: Path, run_dir: Path, **changes: object) -> TrainConfig:
    """Ten steps of a network of 0.1 M parameters."""
    config = TrainConfig(
        pipeline="pyav",
        run_dir=run_dir,
        device="cpu",
        epochs=8,
        max_steps=10,
        batch_size=4,
        device_batch_size=4,
        data=DataConfig(manifest=manifest, stride=2, flip=True, num_workers=1),
        model=ModelConfig(
            image_size=32, num_frames=8, patch_size=8, width=48, depth=2, num_heads=3,
            decoder_width=24, decoder_depth=1, decoder_num_heads=3,
        ),
        mask=MaskConfig(kind="random", ratio=0.75),
        optim=OptimConfig(base_lr=6.4e-2, warmup_epochs=1),
        validation=ValidationConfig(every=0),
        log=LogConfig(metrics_every=1, picture_every=5, checkpoint_every=4, tensorboard=False, progress=False),
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir) if "loss" in line]


def validation_losses(run_dir: Path) -> dict[int, float]:
    """Return the losses on held-out clips, by step."""
    return {line["step"]: line["validation_loss"] for line in read_metrics(run_dir) if "validation_loss" in line}


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    path = newest_checkpoint(run_dir / "checkpoints")
    assert path is not None
    loaded = load_checkpoint(path)
    moments = {
        f"{key}.{name}": tensor for key, entry in loaded["optimizer"]["state"].items() for name, tensor in entry.items()
    }
    return {**loaded["model"], **moments, "step": torch.tensor(loaded["step"])}


def command(manifest: Path, run_dir: Path, *flags: str) -> list[str]:
    """The tiny configuration on tgmae-train's command line, with DALI."""
    return [
        sys.executable, "-m", "tgmae.cli.train", "--pipeline", "dali", "--device", "cpu",
        "--run-dir", str(run_dir), "--data.manifest", str(manifest), "--batch-size", "4", "--device-batch-size", "4",
        "--model.image-size", "32", "--model.patch-size", "8", "--model.num-frames", "8", "--model.width", "48",
        "--model.depth", "2", "--model.decoder-width", "24", "--model.decoder-depth", "1",
        "--log.metrics-every", "1", "--log.picture-every", "1000", "--log.no-tensorboard", "--validation.every", "0",
        "--mask.kind", "tube", "--mask.ratio", "0.75",
        *flags,
    ]  # fmt: skip


def run_here(command: list[str]) -> None:
    """Run the command in this process, which saves the seconds that a new one takes to import everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[2:])
        main()


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_metrics(run_dir)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no step {step} within two minutes"
        time.sleep(0.05)


def wait_for_group_to_end(group: int) -> None:
    """The workers of a killed run notice and end."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("worker processes outlived the run")
