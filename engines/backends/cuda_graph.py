"""A module's forward pass for one shape, recorded once as a CUDA graph and replayed.

A pass of CLIP is some 150 launches. The GPU is busy for longer than they take, but the thread that launches them holds
Python's lock, which the training loop needs: a replay is one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WARMUP = 3  # passes that choose kernels and reserve workspaces, which must not happen while recording


class CapturedPass:
    """`module` on inputs of exactly `shape`, for inference.

    Input, result and everything between have fixed places in memory of the graph's own. Calls may come from any stream:
    each waits for the one before, and hands over a copy of the result that is the caller's. From one thread at a time.
    Recording waits for the GPU, and takes the time of a few passes. Meanwhile other threads may work on it, but neither
    replay a graph nor draw random numbers there: torch has one generator for all, and raises RuntimeError.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.device = shape, device
        # Not in inference mode: what recording keeps of the random generator would be an inference tensor, and another
        # graph, of a training step say, could not write to it (pytorch issue 166792).
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            self._input = torch.zeros(shape, dtype=dtype, device=device)
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(_WARMUP):
                    module(self._input)
            side.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # Thread-local: other threads (DALI's, NCCL's watchdog) may call what a recording thread must not.
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self._output: Tensor = module(self._input)
            torch.cuda.current_stream(device).wait_stream(side)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """The module's output for x of the recorded shape, enqueued on the current stream."""
        assert x.shape == self.shape, f"recorded for {self.shape}, got {tuple(x.shape)}"
        with torch.cuda.device(self.device):
            self._done.wait()
            self._input.copy_(x)
            self._graph.replay()
            out = self._output.clone()
            self._done.record()
        return out
