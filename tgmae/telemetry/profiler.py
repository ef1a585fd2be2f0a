"""`tgmae-train --profile N`: profile N steps with torch's profiler or with nsys (docs/profiling.md)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from engines.files import naming_errors

WARM_UP = 10  # steps until compilation and autotuning are over and the queues have filled
TRACE_FILE = "trace.json.gz"
TABLE_FILE = "operators.txt"


class StepProfiler:
    """Profiles `steps` optimiser steps after the first `WARM_UP` of a run. Call `step` after each one.

    On CUDA it opens the CUDA profiler's window, which `nsys profile -c cudaProfilerApi` records. Outside nsys it writes
    the trace and the operator table of torch's profiler into `folder`; under nsys it does not, because only one
    profiler at a time can listen to the GPU. With steps=0 nothing is profiled.
    """

    def __init__(self, folder: Path, steps: int, device: torch.device) -> None:
        self.folder, self.steps, self.device, self.done = folder, steps, device, 0
        self.note = ""  # says what was recorded, once it has been
        self._torch: profile | None = None
        if steps and "NSYS_PROFILING_SESSION_ID" not in os.environ:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
            # The profiler itself warms up in the step before the window.
            window = schedule(skip_first=WARM_UP - 1, wait=0, warmup=1, active=steps, repeat=1)
            if device.type == "cpu":  # without this, it warns that there is no GPU
                os.environ.setdefault("KINETO_LOG_LEVEL", "5")
            # The loader scores and masks in its own thread.
            threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
            self._torch = profile(
                activities=activities,
                schedule=window,
                on_trace_ready=self._write,
                experimental_config=threads,
                acc_events=True,  # there is only one cycle; without this, torch warns that it keeps the last one only
            )
            self._torch.start()

    def step(self) -> None:
        """Count one finished optimiser step."""
        if not self.steps:
            return
        self.done += 1
        if self._torch is not None:
            self._torch.step()
        if self.device.type == "cuda" and self.done in (WARM_UP, WARM_UP + self.steps):
            torch.cuda.synchronize(self.device)
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaProfilerStart() if self.done == WARM_UP else runtime.cudaProfilerStop()
        if self.done == WARM_UP + self.steps and self._torch is None:
            self.note = f"profiled {self.steps} steps for nsys"

    def close(self) -> None:
        """Stop, and write what was recorded, even if the run ended inside the window."""
        if self._torch is not None:
            self._torch.stop()
            self._torch = None
        if WARM_UP <= self.done < WARM_UP + self.steps:  # the run ended inside the window
            if self.device.type == "cuda":
                torch.cuda.cudart().cudaProfilerStop()  # type: ignore[no-untyped-call]
            self.note = self.note or f"profiled {self.done - WARM_UP} steps for nsys"
        if self.steps and not self.note:
            self.note = f"nothing profiled: the run ended within the {WARM_UP} warm-up steps"

    def _write(self, recorded: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace, table = self.folder / TRACE_FILE, self.folder / TABLE_FILE
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        try:
            with naming_errors(self.folder):
                recorded.export_chrome_trace(str(trace))
                table.write_text(recorded.key_averages().table(sort_by=order, row_limit=40))
        except OSError:  # half of them is no use
            trace.unlink(missing_ok=True)
            table.unlink(missing_ok=True)
            raise
        self.note = (
            f"profile of {self.done - WARM_UP} steps: {self.folder / TRACE_FILE} (ui.perfetto.dev), {TABLE_FILE}"
        )
