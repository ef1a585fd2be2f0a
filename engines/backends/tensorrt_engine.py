"""The engine that runs a tower's TensorRT plan (`tensorrt_plan`) on torch's memory and in its stream order."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.backends.onnx_engine import INPUT, OUTPUT, check_input, export_tower, on_stream, to_plain_memory
from engines.backends.tensorrt_plan import Library, build_plan, choose_opset, describe_plan, load_library, make_log
from engines.sealed import read_sealed, write_sealed
from engines.towers.clip_towers import Tower


class TensorRTEngine:
    """A tower as a plan of `library`, for 1 to `batch` inputs. Graph and plan are made in `cache_dir` if missing.

    Nothing is copied, and the host never waits. Calls share one workspace, so they must follow each other on one stream
    (or on streams that wait for each other).
    Raises ValueError on a CPU, if the library is missing, and if the plan cannot be built.
    """

    def __init__(
        self, tower: Tower, dtype: torch.dtype, device: torch.device, cache_dir: Path, library: Library, batch: int
    ) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"--clip.engine {library} runs on CUDA only; on a CPU use --clip.engine torch or onnxruntime"
            )
        trt = load_library(library)
        self.dtype, self.device = dtype, device
        self._library, self._batch, self._input_shape = library, batch, tower.input_shape
        self._log = make_log(trt)
        graph = export_tower(tower, dtype, cache_dir, choose_opset(trt, library, dtype))
        plan = build_plan(graph, cache_dir / "plans", library, batch, device=device)
        self._output_shape = describe_plan(plan).outputs[0].shape[1:]
        # On the default stream TensorRT makes the host wait. Calls from there run on this stream instead.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            self._runtime = trt.Runtime(self._log)  # must outlive the engine that it makes
            self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
            if self._engine is None:
                raise ValueError(
                    f"{library} rejects the plan {plan}: {self._log.take_errors()}. It was built for this version and "
                    "GPU; delete it to have it built again"
                )
            if library == "tensorrt_rtx":
                self._start_with_runtime_cache(trt, plan.with_suffix(".kernels"))
            else:
                self._start(None)

    def __call__(self, x: Tensor) -> Tensor:
        """Embed [n, *tower.input_shape] → [n, …, E], n from 1 to `batch`. Raises ValueError for any other input."""
        check_input(x, self._input_shape, self.dtype, self.device)
        if x.shape[0] > self._batch:
            raise ValueError(f"this plan takes up to {self._batch} inputs at once, got {x.shape[0]}")
        x = to_plain_memory(x)
        out = torch.empty(x.shape[0], *self._output_shape, dtype=self.dtype, device=x.device)
        current = torch.cuda.current_stream(self.device)
        own = self._stream if current == torch.cuda.default_stream(self.device) else None
        with torch.cuda.device(self.device), on_stream(own, x, out):
            done = (
                self._context.set_input_shape(INPUT, tuple(x.shape))
                and self._context.set_tensor_address(INPUT, x.data_ptr())
                and self._context.set_tensor_address(OUTPUT, out.data_ptr())
                and self._context.execute_async_v3((own or current).cuda_stream)
            )
        if not done:
            raise RuntimeError(f"{self._library} could not run a batch of {x.shape[0]}: {self._log.take_errors()}")
        return out

    def _start(self, runtime_config: Any) -> None:
        """Make the execution context and run it once."""
        made = self._engine.create_execution_context
        self._context = made() if runtime_config is None else made(runtime_config)
        if self._context is None:
            raise ValueError(
                f"{self._library} could not reserve its workspace for {self._batch} inputs: {self._log.take_errors()}. "
                "Try a smaller --clip.batch"
            )
        # The first call loads kernels and, for tensorrt_rtx, compiles them. Do it now, not in the first training step.
        self(torch.zeros(self._batch, *self._input_shape, dtype=self.dtype, device=self.device))
        torch.cuda.synchronize(self.device)

    def _start_with_runtime_cache(self, trt: Any, path: Path) -> None:
        """Start tensorrt_rtx, which compiles kernels on the machine that runs them, and keep these in `path`."""
        config = self._engine.create_runtime_config()
        # Eager: by default kernels are replaced some time after the first call, which changes scores, and so masks, in
        # the middle of a run.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._runtime_cache = config.create_runtime_cache()
        before = read_sealed(path)
        if before and not self._runtime_cache.deserialize(before):
            print(f"tgmae: {path} is of another driver or damaged; compiling the kernels again", file=sys.stderr)
        config.set_runtime_cache(self._runtime_cache)
        self._start(config)
        after = bytes(memoryview(self._runtime_cache.serialize()))
        if after != before:
            write_sealed(path, after)
