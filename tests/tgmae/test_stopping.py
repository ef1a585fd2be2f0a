"""Signals stop a run without loss, in every phase and in every process; what a killed run owes is made up for."""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.support.processes import places_of_two
from tests.support.runs import REPOSITORY, command, run_here, tiny, wait_for_step
from tests.tgmae.model.networks import import_hf
from tgmae.config.model import ModelConfig
from tgmae.model.huggingface import export_hf, read_step
from tgmae.model.videomae import VideoMAE
from tgmae.model.weights import digest_weights
from tgmae.telemetry.metrics import read_metrics
from tgmae.train import train
from tgmae.training.checkpoints.folder import newest_checkpoint
from tgmae.training.checkpoints.read import load_checkpoint
from tgmae.training.run_folder import LOCK_FILE

SMALL = ModelConfig(
    image_size=32, num_frames=4, width=192, depth=2, num_heads=2, decoder_width=12, decoder_depth=1, decoder_num_heads=2
)
# A shell's `&` would leave SIGINT ignored.
HEED_CTRL_C = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)


def start(arguments: list[str], prepare: Callable[[], object] = HEED_CTRL_C, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, cwd=REPOSITORY, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=prepare, env={**os.environ, **variables},
    )  # fmt: skip


def assert_all_is_saved(run_dir: Path) -> None:
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    step = load_checkpoint(newest)["step"]
    assert step == read_metrics(run_dir)[-1]["step"] == read_step(run_dir / "hf")
    assert not list(run_dir.rglob("*.tmp"))
    assert not (run_dir / LOCK_FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # the others: through torchrun, below
def test_a_signal_finishes_the_step_and_saves(shapes: Path, tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM to the process, the others to its whole group, as terminals and Slurm do (the workers get them too)."""
    process = start(command(shapes, tmp_path, "--epochs", "1000"))
    wait_for_step(tmp_path, 3, process)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, output
    assert f"stopped by {number.name}" in output
    assert "Traceback" not in output
    assert "DALI failed" not in output
    assert_all_is_saved(tmp_path)


@pytest.mark.slow
def test_the_terminal_may_close(shapes: Path, tmp_path: Path) -> None:
    """Everything that is printed after that fails, and the run is saved as well."""
    master, slave = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    arguments = command(shapes, tmp_path, "--epochs", "1000", "--log.no-progress")
    process = subprocess.Popen(
        arguments, cwd=REPOSITORY, text=True, start_new_session=True, stdin=slave, stdout=slave, stderr=slave,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(slave)
    wait_for_step(tmp_path, 2, process)
    os.close(master)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    assert_all_is_saved(tmp_path)


@pytest.mark.slow
def test_nohup_keeps_a_run_alive(shapes: Path, tmp_path: Path) -> None:
    process = start(
        command(shapes, tmp_path, "--epochs", "1000"), partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    )
    wait_for_step(tmp_path, 1, process)
    os.killpg(process.pid, signal.SIGHUP)
    wait_for_step(tmp_path, read_metrics(tmp_path)[-1]["step"] + 3, process)
    process.terminate()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM" in output


@pytest.mark.slow
@pytest.mark.parametrize(("number", "line"), [(signal.SIGINT, "tgmae"), (signal.SIGHUP, "data")])
def test_a_signal_during_set_up_leaves_no_traceback(
    shapes: Path, tmp_path: Path, number: signal.Signals, line: str
) -> None:
    """While torch is imported, and between the first lines and the first step."""
    process = start(command(shapes, tmp_path / "run", "--epochs", "1000"))
    assert process.stdout is not None
    before = ""
    while not (got := process.stdout.readline()).startswith(line):
        assert got, before
        before += got
    os.killpg(process.pid, number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, output
    assert "Traceback" not in before + output
    assert "Error" not in before + output
    assert f"stopped by {number.name}" in output


@pytest.mark.slow
def test_a_signal_during_the_export_waits_for_its_end(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(model: VideoMAE, folder: Path, step: int, weights: dict[str, Tensor]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        export_hf(model, folder, step, weights)

    monkeypatch.setattr("tgmae.train.export_hf", export)
    with pytest.raises(SystemExit) as caught:
        run_here(command(shapes, tmp_path, "--epochs", "10", "--max-steps", "2", "--pipeline", "pyav"))
    assert caught.value.code == 128 + signal.SIGTERM
    assert_all_is_saved(tmp_path)
    assert (tmp_path / "loss.png").exists()


@pytest.mark.slow
def test_sigquit_shows_where_every_thread_is(shapes: Path, tmp_path: Path) -> None:
    process = start(command(shapes, tmp_path, "--epochs", "1000", "--pipeline", "pyav"))
    wait_for_step(tmp_path, 1, process)
    process.send_signal(signal.SIGQUIT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == -signal.SIGQUIT
    assert "in _take_steps" in output
    assert "in _make_batch" in output or "Thread 0x" in output


# Several processes


def start_two(first: list[str], second: list[str] | None = None) -> list[subprocess.Popen[str]]:
    """Start the two processes of a run as torchrun would, with the same arguments unless the second has its own."""
    return [
        start(arguments, **place) for arguments, place in zip((first, second or first), places_of_two(), strict=True)
    ]


TWO = ("--epochs", "1000", "--device-batch-size", "2", "--pipeline", "pyav")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_all_of_them(shapes: Path, tmp_path: Path, parallel: str) -> None:
    processes = start_two(command(shapes, tmp_path, *TWO, "--parallel", parallel))
    wait_for_step(tmp_path, 2, processes[0])
    processes[1].terminate()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, outputs
    assert "stopped by SIGTERM" in outputs[0]
    assert not any("Traceback" in output for output in outputs)
    assert_all_is_saved(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_torchrun_passes_signals_on_and_everything_is_saved(
    shapes: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C may reach each process twice: from the terminal and from torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [] if number == signal.SIGINT else ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    process = start([*launcher, *flags, *command(shapes, tmp_path, *TWO)[1:]])
    wait_for_step(tmp_path, 2, process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert output.count(f"stopped by {number.name}") == 1
    assert "at once" not in output
    assert_all_is_saved(tmp_path)


@pytest.mark.slow
def test_processes_that_see_other_checkpoints_do_not_train(shapes: Path, tmp_path: Path) -> None:
    """As on several machines without a common file system."""
    arguments = [command(shapes, tmp_path / str(rank), *TWO) for rank in range(2)]
    run_here([*arguments[0], "--max-steps", "1"])
    processes = start_two(arguments[0], arguments[1])
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    for rank, output in enumerate(outputs):
        assert f"process {rank} of 2 would start from step {1 - rank}, another one from another step" in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_what_ends_one_process_ends_the_other(shapes: Path, tmp_path: Path) -> None:
    """One line each; the steps until then are saved."""
    (tmp_path / "pictures").touch()
    processes = start_two(command(shapes, tmp_path, *TWO, "--log.picture-every", "2"))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    assert f"tgmae-train: [Errno 17] File exists: '{tmp_path}/pictures'" in outputs[0]
    assert "tgmae-train: rank 1 of 2 ends because another one has ended; its message says why" in outputs[1]
    assert not any("Traceback" in output for output in outputs), outputs
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == "step_00000001.pt"  # after which the first picture is drawn


# The end of a run


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_a_whole_folder_or_none(tmp_path: Path) -> None:
    """Killed at any moment; what it leaves is gone after the next export."""
    hf, model, generator, deadline = tmp_path / "hf", VideoMAE(SMALL), random.Random(0), time.monotonic() + 120
    for _ in range(15):
        child = os.fork()
        if child == 0:
            for step in itertools.count(1):
                export_hf(model, hf, step)
        while not hf.exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.1 * generator.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if hf.exists():
            import_hf(model, hf)
            assert read_step(hf) is not None
    export_hf(model, hf, 0)
    assert os.listdir(tmp_path) == ["hf"]
    assert read_step(hf) == 0


@pytest.mark.slow
def test_a_finished_run_makes_up_for_missing_results(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last checkpoint and the end of the export, the same command exports, once."""
    monkeypatch.setattr("tgmae.train._draw", lambda *_: None)  # takes most of a tiny run's time
    run_dir = tmp_path / "run"
    hf, config = run_dir / "hf", tiny(shapes, run_dir, max_steps=2)
    train(replace(config, max_steps=1))
    shutil.copytree(hf, tmp_path / "older")
    train(config)
    whole = digest_weights(load_file(hf / "model.safetensors"))
    damages: list[Callable[[], object]] = [
        lambda: shutil.rmtree(hf),
        lambda: (hf / "config.json").unlink(),
        lambda: (hf / "model.safetensors").replace(tmp_path / "moved"),
        lambda: (tmp_path / "older" / "model.safetensors").replace(hf / "model.safetensors"),
        lambda: (run_dir / "loss.png").unlink(),
    ]
    for damage in damages:
        damage()
        capsys.readouterr()
        for _ in range(2):
            assert train(config).step == 2
        said = capsys.readouterr().out
        assert said.count("nothing to do: step 2 of 2 is done") == 2
        assert said.count(f"the results of step 2 were missing: wrote {run_dir}/hf and loss.png") == 1
        assert read_step(hf) == 2
        assert digest_weights(load_file(hf / "model.safetensors")) == whole
        assert (run_dir / "loss.png").stat().st_size > 1000
