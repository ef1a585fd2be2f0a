"""Prove that weights are undamaged, and check that they fit a model."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def digest_weights(weights: dict[str, Tensor]) -> str:
    """Return a digest of names, types, shapes and values of weights on the CPU."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_shapes(expected: dict[str, Tensor], got: dict[str, Tensor], source: str) -> None:
    """Compare the names and shapes of two state dicts.

    Raises ValueError, which names `source` and both shapes, if `got` does not fit `expected`.
    """
    missing, extra = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{source} holds the weights of a different model: missing {missing[:3]}, not expected {extra[:3]}"
        )
    for name, tensor in expected.items():
        if tensor.shape != got[name].shape:
            raise ValueError(
                f"{source} holds the weights of a different model: {name} is {list(got[name].shape)} there, "
                f"{list(tensor.shape)} in this configuration"
            )


def check_values(weights: dict[str, Tensor]) -> None:
    """Raise ValueError for weights that are quantised, sparse, without data, or not finite."""
    for name, weight in weights.items():
        if weight.dtype not in _FLOATS or weight.layout is not torch.strided or weight.is_meta:
            kind = f"{weight.dtype}, {weight.layout}, on {weight.device}".replace("torch.", "")
            raise ValueError(f"expected dense floating-point numbers of 16, 32 or 64 bits in {name}, got {kind}")
        if not weight.isfinite().all():
            raise ValueError(f"its weight {name} contains NaN or infinity")
