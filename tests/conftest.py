"""Fixtures every test may use, and the rule that a GPU job cannot pass by skipping."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tests.support.faults.flips import Flips, TryFlips, count_flips

os.environ["MPLBACKEND"] = "Agg"  # not through matplotlib, without which the GPU's tests run too
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    # Triton reads this when it meets @triton.jit, so it must stand before any test imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def skip_or_fail(missing: str) -> NoReturn:
    """End a GPU test for want of the GPU or of a backend: skipped, but failed under TGMAE_REQUIRE_GPU=1."""
    if os.environ.get("TGMAE_REQUIRE_GPU") == "1":
        pytest.fail(missing, pytrace=False)
    pytest.skip(f"{missing} (TGMAE_REQUIRE_GPU=1 makes this a failure)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        skip_or_fail("no CUDA device")


@pytest.fixture(scope="session")
def nvdec() -> None:
    """For GPU tests that decode there: without NVDEC they end as `skip_or_fail` says."""
    from dali_pipelines.nvdec import NoNvdec
    from dali_pipelines.placement import find_nvdec

    try:
        find_nvdec(torch.device("cuda", 0))
    except NoNvdec as error:
        skip_or_fail(str(error))


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


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a CLIP with open_clip by name, so that its weights may come from a file or a tag."""
    import open_clip.factory

    from tests.support.clip_models import small_config

    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    config = tmp_path / "tgmae-test.json"
    config.write_text(json.dumps({**small_config(), "quick_gelu": True}))
    open_clip.add_model_config(config)
    return "tgmae-test"


# Faults: how often they are tried, and what came of it


@pytest.fixture
def repetitions() -> Callable[[int, int], int]:
    """Choose how often a fault is tried: a few times, or as often as docs/results.md says with TGMAE_FAULTS=all."""
    return lambda few, everything: everything if os.environ.get("TGMAE_FAULTS") == "all" else few


@pytest.fixture
def record_counts(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Keep what a fault was tried on and what was counted in pytest's report, from which `bench.faults` reads it."""
    return lambda what, **counts: record_property(what, json.dumps(counts))


@pytest.fixture
def try_flips(repetitions: Callable[[int, int], int], record_counts: Callable[..., None]) -> TryFlips:
    """Flip single bits of a file (`tests.support.faults.flips`)."""

    def try_them(
        path: Path, read: Callable[[], object], *, few: int = 300, all: int = 3000, seed: int = 0, first_byte: int = 0
    ) -> Flips:
        flips = count_flips(path, repetitions(few, all), read, seed, first_byte)
        counts = {"tried": flips.tried, "refused": flips.refused, "silent": flips.silent}
        record_counts(path.name, bytes=path.stat().st_size, **counts)
        assert flips.silent == 0
        return flips

    return try_them
