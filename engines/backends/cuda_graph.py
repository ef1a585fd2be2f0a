"""A module's forward pass for one input shape, recorded once as a CUDA graph and replayed.

A pass of CLIP is about 150 kernel launches. The GPU is busy for longer than the launches take, but the thread that
launches them holds Python's global lock, which the training loop needs. A replay is a single launch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WARMUP = 3  # passes in which libraries choose kernels and allocate workspaces; neither is allowed while recording


class CapturedPass:
    """A recorded forward pass of `module` on inputs of exactly `shape`, for inference.

    Input, result and all intermediate values have fixed places in the graph's own memory. Calls may come from any
    stream, but from one thread at a time: each call waits for the previous one and returns its own copy of the result.

    Recording waits for the GPU and takes as long as a few passes. Other threads may use the GPU meanwhile, but must not
    replay a graph or draw random numbers on it: torch has a single generator and would raise RuntimeError.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.device = shape, device
        # Not in inference mode: the random generator's state that recording keeps would become an inference tensor, to
        # which another graph, such as that of a training step, could not write (pytorch issue 166792).
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            # Warm up and record on a side stream: a graph cannot be recorded on the default stream.
            self._input = torch.zeros(shape, dtype=dtype, device=device)
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(_WARMUP):
                    module(self._input)
            side.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # Thread-local: other threads (DALI's, NCCL's watchdog) may make calls that this thread must not make while
            # it records.
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self._output: Tensor = module(self._input)
            torch.cuda.current_stream(device).wait_stream(side)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """Enqueue a replay on the current stream; return the output for `x`, which has the recorded shape."""
        assert x.shape == self.shape, f"recorded for {self.shape}, got {tuple(x.shape)}"
        with torch.cuda.device(self.device):
            self._done.wait()
            self._input.copy_(x)
            self._graph.replay()
            out = self._output.clone()
            self._done.record()
        return out
