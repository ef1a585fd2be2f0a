"""An export means the same in the oldest and the newest release of transformers that is supported, and between them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.tgmae.model import compare_export
from tests.tgmae.model.networks import SMALL, bool_masked_pos, inputs, our_model, pixel_values
from tgmae.model.huggingface import export_hf

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "guide.md"
# What a release needs beside the packages of this environment: the oldest, and the first of 5, which changed the names
# of the biases. The newest is the one that is installed.
REQUESTS = ["requests", "urllib3", "certifi", "charset_normalizer"]
RELEASES = {
    "4.26.1": ["huggingface_hub==0.19.4", "tokenizers==0.13.3", *REQUESTS],
    "5.0.0": ["huggingface_hub==1.3.4", "tokenizers==0.22.1", "httpx", "httpcore", "h11", "certifi"],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export, frames, and what our network computes from them."""
    folder, ours = tmp_path_factory.mktemp("exported"), our_model(SMALL, 40)
    export_hf(ours, folder / "hf")
    frames, masks = inputs(SMALL, "random", 41, batch=1)
    with torch.no_grad():
        expected = {
            "frames": frames[0],
            "pixels": pixel_values(frames, torch.float32).contiguous(),
            "masked": bool_masked_pos(SMALL, masks).to(torch.uint8),
            "prediction": ours(frames, masks)[1],
            "features": ours.encode(frames, torch.arange(SMALL.num_tokens, dtype=torch.int32)[None]),
        }
    save_file(expected, folder / "expected.safetensors")
    return folder


def install(release: str, cache: Path) -> Path:
    """Return a folder with this release of transformers, installed unless it is there; skip where pip cannot."""
    folder = cache / f"transformers-{release}-python{sys.version_info.major}.{sys.version_info.minor}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=cache) as new:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
        pip += ["--retries", "0", "--timeout", "15", "--target", f"{new}/site"]
        done = subprocess.run([*pip, f"transformers=={release}", *RELEASES[release]], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install transformers {release}: {done.stderr.strip().splitlines()[-1]}")
        Path(new, "site").rename(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_an_older_release_reads_an_export(release: str, exported: Path, pytestconfig: pytest.Config) -> None:
    packages = install(release, pytestconfig.cache.mkdir("transformers"))
    done = subprocess.run(
        [sys.executable, "-P", compare_export.__file__, exported], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"release": release, "difference": ""}


def test_the_newest_release_reads_an_export(exported: Path) -> None:
    assert compare_export.find_difference(exported) == ""


def test_the_guide_names_the_releases() -> None:
    [(oldest, newest)] = re.findall(r"transformers (\d[\d.]*) to (\d[\d.]*\d)", GUIDE.read_text(encoding="utf-8"))
    assert min(RELEASES, key=lambda release: [*map(int, release.split("."))]).startswith(oldest)
    assert transformers.__version__.startswith(newest)
