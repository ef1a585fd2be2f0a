"""Fixtures every test may use, and the rule that a GPU job cannot pass by skipping."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"  # not through matplotlib, without which the GPU's tests run too
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    # Triton reads this when it meets @triton.jit, so it must stand before any test imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped without a GPU; under TGMAE_REQUIRE_GPU=1 they run, and so fail."""
    if torch.cuda.is_available() or os.environ.get("TGMAE_REQUIRE_GPU") == "1":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device (TGMAE_REQUIRE_GPU=1 makes this a failure)"))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 24 shapes clips (20 train, 4 val)."""
    from tgmae.shapes.scenes import make_shapes

    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, count=24, seed=7, codec="h264", num_objects=1, num_workers=2)
    return folder / "manifest.parquet"


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For clip.cache_dir, so that no test reads or writes the user's own cache."""
    return tmp_path_factory.mktemp("cache")
