"""A run's metrics: one JSON line per report in metrics.jsonl, and the same numbers in TensorBoard.

Each line ends with a checksum of its values, which readers may ignore.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.files import naming_errors, write_atomically
from engines.sealed import open_fields, seal_fields

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to a run's metrics. Lines of steps after `first_step`, which a resumed run repeats, are dropped first.

    note   says which lines could not be read and are left out, "" for none

    Raises ValueError if `tensorboard` is set and TensorBoard is not installed, and OSError, which names the file, where
    something cannot be written.
    """

    def __init__(self, run_dir: Path, first_step: int, tensorboard: bool) -> None:
        self._path, self._folder = run_dir / METRICS_FILE, run_dir / "tensorboard"
        lines, unreadable = _parse(self._path)
        kept = [line for line in lines if line["step"] <= first_step]
        self.note = _describe_unreadable(self._path, unreadable)
        write_atomically(self._path, "".join(map(_to_text, kept)).encode())
        self._file = self._path.open("a")
        self._board: SummaryWriter | None = None
        self._make_board: Callable[[], SummaryWriter] | None = None
        if tensorboard:
            if find_spec("tensorboard") is None:
                raise ValueError("TensorBoard is not installed: pip install tensorboard, or use --log.no-tensorboard")
            self._make_board = partial(_open_board, self._folder, first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one report, made after optimiser step `step`."""
        with naming_errors(self._path):
            self._file.write(_to_text({"step": step, **values}))
            self._file.flush()
        with naming_errors(self._folder):
            if (board := self._open()) is not None:
                for name, value in values.items():
                    board.add_scalar(name, value, step)

    def write_picture(self, step: int, path: Path) -> None:
        """Show a PNG that was drawn after optimiser step `step` in TensorBoard, if there is one."""
        with naming_errors(self._folder):
            if (board := self._open()) is not None:
                from PIL import Image  # as TensorBoard's writer does

                with Image.open(path) as picture:
                    board.add_image(path.parent.name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def _open(self) -> SummaryWriter | None:
        if self._board is None and self._make_board is not None:
            self._board = self._make_board()
        return self._board

    def sync(self) -> None:
        """Flush the reports to disk, so that they survive a power cut."""
        with naming_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(naming_errors(self._folder))
            if self._board is not None:
                stack.callback(self._board.close)
            stack.callback(self._file.close)


def _open_board(folder: Path, first_step: int) -> SummaryWriter:
    """Open TensorBoard's files. Importing it takes half a second, which the first step need not wait for."""
    from torch.utils.tensorboard import SummaryWriter

    hook = threading.excepthook

    def be_silent_about_the_board(args: threading.ExceptHookArgs) -> None:
        # The thread that writes the files hands its error to the next caller, who is told in one line.
        if not type(args.thread).__module__.startswith("tensorboard."):
            hook(args)

    threading.excepthook = be_silent_about_the_board
    return SummaryWriter(str(folder), purge_step=first_step)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return all reports of a run, oldest first, without their checksums. Lines cut off or damaged are named."""
    lines, unreadable = _parse(run_dir / METRICS_FILE)
    if unreadable:
        print(_describe_unreadable(run_dir / METRICS_FILE, unreadable), file=sys.stderr)
    return lines


def _to_text(line: dict[str, Any]) -> str:
    return json.dumps(seal_fields(line)) + "\n"


def _describe_unreadable(path: Path, numbers: list[int]) -> str:
    return f"left out of {path}, cut off or damaged: lines {', '.join(map(str, numbers))}" if numbers else ""


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the reports in a file, and the numbers of the lines that are none or damaged, counted from 1."""
    lines: list[dict[str, Any]] = []
    unreadable: list[int] = []
    for number, text in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        line, is_whole = open_fields(line) if isinstance(line, dict) else ({}, False)
        are_numbers = all(isinstance(value, int | float) for value in line.values())
        if is_whole and are_numbers and isinstance(line.get("step"), int):
            lines.append(line)
        elif text:
            unreadable.append(number)
    return lines, unreadable


class Throughput:
    """Losses, speed and waiting time of training, since the last report and over the whole run.

    paused_s   seconds of pauses, which do not count

    Create it just before the first step: its clock starts then.
    """

    def __init__(self) -> None:
        self._run_begun_s = self._begun_s = time.perf_counter()
        self._waited_s = 0.0
        self._losses: Counter[str] = Counter()  # sums over steps
        self._stages: dict[str, float] = {}
        self._steps = self._clips = self._run_clips = 0
        self._first_s: float | None = None  # from the start to the end of the first step
        self.paused_s = 0.0

    def pause(self, seconds: float) -> None:
        """Leave the last `seconds` out of every figure: the run did something else than to train."""
        self.paused_s += seconds
        self._begun_s += seconds
        self._run_begun_s += seconds

    @property
    def paused_share(self) -> float:
        """The share of the whole run in which it was paused."""
        return self.paused_s / (self.paused_s + time.perf_counter() - self._run_begun_s)

    def count(self, clips: int, losses: Mapping[str, float]) -> None:
        """Count one finished optimiser step and its losses."""
        if self._first_s is None:
            self._first_s = time.perf_counter() - self._run_begun_s
        self._steps += 1
        self._losses.update(losses)
        self._clips += clips
        self._run_clips += clips

    def report(self, waited_s: float, stages: dict[str, float]) -> dict[str, float]:
        """Return the figures since the last call.

        waited_s  seconds spent waiting for input since the start of the run
        stages    seconds spent in each stage since the start of the run

        `<stage>_share` is the stage's time over the time that passed. The loader's stages run beside those of the
        step, so the shares may add up to more than 1.
        """
        now = time.perf_counter()
        elapsed_s, window_waited_s = now - self._begun_s, waited_s - self._waited_s
        steps, clips, losses = self._steps, self._clips, self._losses
        self._begun_s, self._waited_s, self._steps, self._clips, self._losses = now, waited_s, 0, 0, Counter()
        spent = {name: total - self._stages.get(name, 0.0) for name, total in stages.items()}
        self._stages = stages
        return {
            **{name: total / steps for name, total in losses.items()},
            "clips_per_s": clips / elapsed_s,
            "step_ms": 1000 * elapsed_s / steps,
            "wait_ms": 1000 * window_waited_s / steps,
            "wait_share": window_waited_s / elapsed_s,
            **{f"{name}_share": seconds / elapsed_s for name, seconds in spent.items()},
        }

    def summary(self, waited_s: float) -> str:
        """Describe the whole run. The first step's time is given apart because it includes any compilation."""
        elapsed_s = time.perf_counter() - self._run_begun_s
        paused = f", {self.paused_share:.1%} validating" if self.paused_s else ""
        first = "" if self._first_s is None else f" (first step after {self._first_s:.1f} s)"
        return (
            f"{elapsed_s + self.paused_s:.0f} s{first}, {self._run_clips / elapsed_s:.1f} clips/s, "
            f"{waited_s / elapsed_s:.0%} of the time waiting for input{paused}"
        )
