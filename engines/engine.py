"""An engine runs one tower on one device: a batch of pixels in, a batch of embeddings out.

Four exist. torch is the reference; onnxruntime, tensorrt and tensorrt_rtx run the tower's exported graph.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engines.towers import Tower
from tgmae.config import ClipConfig


class Engine(Protocol):
    """dtype and device of its input; its output is on the same device."""

    dtype: torch.dtype
    device: torch.device

    def __call__(self, x: Tensor) -> Tensor:
        """[n, *tower.input_shape] → [n, …, E], for any n from 1 to clip.batch."""
        ...


class TorchEngine:
    """The tower itself."""

    def __init__(self, tower: Tower, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.tower = tower.eval().requires_grad_(False).to(device, dtype)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.tower(x)
        return out


def open_engine(tower: Tower, config: ClipConfig, device: torch.device, batch: int) -> Engine:
    """The engine that `config` names for a tower, for up to `batch` inputs at once.

    Raises ValueError, with what to install, where that engine cannot run here.
    """
    dtype = choose_dtype(config, device)
    match config.engine:
        case "torch":
            return TorchEngine(tower, dtype, device)
        case "onnxruntime":
            from engines.onnx_engine import OnnxEngine

            return OnnxEngine(tower, dtype, device, config.cache_dir.expanduser())
        case _:
            from engines.tensorrt_engine import TensorRTEngine

            return TensorRTEngine(tower, dtype, device, config.cache_dir.expanduser(), config.engine, batch)


def patches_per_pass(config: ClipConfig, device: torch.device) -> int:
    """clip.batch, or what is right for the device."""
    return config.batch or (4096 if device.type == "cuda" else 512)


def choose_dtype(config: ClipConfig, device: torch.device) -> torch.dtype:
    """float16 on CUDA and float32 on a CPU, unless clip.precision says otherwise."""
    half = config.precision == "fp16" or (config.precision == "auto" and device.type == "cuda")
    return torch.float16 if half else torch.float32
