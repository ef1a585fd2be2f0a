"""`tgmae-train --profile N`: look at N steps, with torch's profiler or with nsys (docs/profiling.md)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 10  # steps: compilation, autotuning and the first full queues are over
TRACE_FILE = "trace.json.gz"
TABLE_FILE = "operators.txt"


class StepProfiler:
    """Profiles `steps` optimiser steps after the first `WARM_UP` of a run; call `step` after every one.

    Opens the window of the CUDA profiler, which `nsys profile -c cudaProfilerApi` records, and writes a trace and a
    table of torch's profiler into `folder`. Under nsys torch's profiler stays out of the way: only one of the two can
    listen to the GPU. steps 0 profiles nothing.
    """

    def __init__(self, folder: Path, steps: int, device: torch.device) -> None:
        self.folder, self.steps, self.device, self.done = folder, steps, device, 0
        self.note = ""  # what was written, once it is
        self._torch: profile | None = None
        if steps and "NSYS_PROFILING_SESSION_ID" not in os.environ:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
            # The step before the window warms the profiler itself up.
            plan = schedule(skip_first=WARM_UP - 1, wait=0, warmup=1, active=steps, repeat=1)
            if device.type == "cpu":  # or it complains that there is no GPU
                os.environ.setdefault("KINETO_LOG_LEVEL", "5")
            # The loader scores and masks in a thread of its own.
            threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
            self._torch = profile(
                activities=activities,
                schedule=plan,
                on_trace_ready=self._write,
                experimental_config=threads,
                acc_events=True,  # there is one cycle; without it torch warns that it keeps the last only
            )
            self._torch.start()

    def step(self) -> None:
        """One optimiser step is done."""
        if not self.steps:
            return
        if self._torch is not None:
            self._torch.step()
        self.done += 1
        if self.device.type == "cuda" and self.done in (WARM_UP, WARM_UP + self.steps):
            torch.cuda.synchronize(self.device)
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaProfilerStart() if self.done == WARM_UP else runtime.cudaProfilerStop()
        if self.done == WARM_UP + self.steps and self._torch is None:
            self.note = f"profiled {self.steps} steps for nsys"

    def close(self) -> None:
        """Stop, also where the run ended before its window did; what was seen by then is written."""
        if self._torch is not None:
            self._torch.stop()
            self._torch = None
        if WARM_UP <= self.done < WARM_UP + self.steps:  # the run ended inside the window
            if self.device.type == "cuda":
                torch.cuda.cudart().cudaProfilerStop()  # type: ignore[no-untyped-call]
            self.note = self.note or f"profiled {self.done - WARM_UP} steps for nsys"
        if self.steps and not self.note:
            self.note = f"nothing profiled: the run ended within {WARM_UP} steps, which are taken for warm-up"

    def _write(self, seen: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(self.folder / TRACE_FILE))
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        (self.folder / TABLE_FILE).write_text(seen.key_averages().table(sort_by=order, row_limit=40))
        self.note = f"profile of {self.steps} steps: {self.folder / TRACE_FILE} (ui.perfetto.dev), {TABLE_FILE}"
