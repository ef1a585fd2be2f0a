"""An engine runs one tower on one device: a batch of pixels in, a batch of embeddings out.

There are four. torch is the reference; onnxruntime, tensorrt and tensorrt_rtx run the tower's exported graph.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engines.backends.cuda_graph import CapturedPass
from engines.config import CLIPConfig
from engines.towers.clip_towers import Tower
from engines.towers.fp8 import use_fp8

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}


class Engine(Protocol):
    """A tower that is ready to run.

    dtype, device   of its input and its output
    """

    dtype: torch.dtype
    device: torch.device

    def __call__(self, x: Tensor) -> Tensor:
        """Embed [n, *tower.input_shape] → [n, …, E], for any n from 1 to the batch that the engine was opened for."""
        ...


class TorchEngine:
    """The tower itself, run by torch.

    batch   On CUDA, record the forward pass for this many inputs as a CUDA graph, and replay it for every batch of that
            size. Smaller batches run eagerly: padding them would cost a full pass, and small batches of clips never
            fill one.
    """

    def __init__(self, tower: Tower, dtype: torch.dtype, device: torch.device, batch: int | None = None) -> None:
        self.dtype, self.device = dtype, device
        self.tower = tower.eval().requires_grad_(False).to(device, dtype)
        self._captured: CapturedPass | None = None
        if batch is not None and device.type == "cuda":
            self._captured = CapturedPass(self.tower, (batch, *tower.input_shape), dtype, device)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        if self._captured is not None and x.shape == self._captured.shape:
            return self._captured(x)
        out: Tensor = self.tower(x)
        return out


def open_engine(tower: Tower, config: CLIPConfig, device: torch.device, batch: int) -> Engine:
    """Open the engine that `config` names, for up to `batch` inputs at once. It takes ownership of the tower.

    Raises ValueError, with what to install or to use instead, if that engine or precision cannot run on `device`.
    """
    dtype = choose_dtype(config, device)
    match config.engine:
        case "torch":
            if config.precision == "fp8":
                use_fp8(tower, device)
            return TorchEngine(tower, dtype, device, batch if config.cuda_graph else None)
        case "onnxruntime":
            from engines.backends.onnx_engine import OnnxEngine

            return OnnxEngine(tower, dtype, device, config.cache_dir.expanduser())
        case _:
            from engines.backends.tensorrt_engine import TensorRTEngine

            return TensorRTEngine(tower, dtype, device, config.cache_dir.expanduser(), config.engine, batch)


def choose_dtype(config: CLIPConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of an engine's input and output. fp8 has bfloat16; auto is float16 on CUDA, else float32."""
    return _DTYPES[config.precision_on(device.type)]
