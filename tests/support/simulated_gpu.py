"""A GPU in simulated time: what CUDA events tell of a stream on which work runs in order, beside a host that waits."""

from __future__ import annotations


class SimulatedGpu:
    """Work that was launched runs in order; `host_s` and `free_s` are the seconds at which host and stream are."""

    def __init__(self) -> None:
        self.host_s = self.free_s = 0.0

    def launch(self, seconds: float, host_s: float = 0.0) -> None:
        """Queue work of `seconds`, which takes the host `host_s`."""
        self.free_s = max(self.free_s, self.host_s) + seconds
        self.host_s += host_s

    def event(self, **_: bool) -> SimulatedEvent:
        """Stand in for torch.cuda.Event."""
        return SimulatedEvent(self)


class SimulatedEvent:
    """Completes when everything queued before `record` is done."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self.gpu, self.at_s = gpu, 0.0

    def record(self) -> None:
        self.at_s = max(self.gpu.free_s, self.gpu.host_s)

    def query(self) -> bool:
        return self.gpu.host_s >= self.at_s

    def synchronize(self) -> None:
        self.gpu.host_s = max(self.gpu.host_s, self.at_s)

    def elapsed_time(self, end: SimulatedEvent) -> float:
        return 1000 * (end.at_s - self.at_s)
