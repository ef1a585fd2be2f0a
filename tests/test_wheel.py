"""A wheel of this project holds what it needs, and trains the demo from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tgmae", "kernels", "dali_pipelines", "engines")
MODEL_FILES = {"README.md", "card.json", "open_clip_config.json", "open_clip_model.safetensors"}

pytestmark = pytest.mark.slow


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    """Run a command without this checkout on Python's path; return what it prints."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the checkout, because setuptools writes beside the sources."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs setuptools 77 to build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*PACKAGES, "bench", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*"):
        if file.is_file():
            shutil.copy(file, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    run([sys.executable, "-c", build], source)
    (built,) = out.glob("tgmae-*.whl")
    return built


def test_the_wheel_holds_the_packages_and_no_more(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert names == sources | {f"engines/tiny_clip/{name}" for name in MODEL_FILES}


def test_an_installed_wheel_trains_the_demo(wheel: Path, tmp_path: Path) -> None:
    """The environment is fresh but for the libraries, which it borrows from this one; nothing is downloaded."""
    fresh, empty = tmp_path / "fresh", tmp_path / "empty"
    venv.create(fresh, symlinks=True)
    empty.mkdir()
    python = fresh / "bin" / "python"
    installing = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel]
    run([sys.executable, "-m", "pip", "--python", python, *installing], empty)
    library = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], empty).strip())
    # Paths in a .pth file come after the folder that holds it, and .pth files in those folders do not count: an
    # editable install of the checkout is not seen.
    (library / "borrowed.pth").write_text("\n".join([*site.getsitepackages(), site.getusersitepackages()]))
    imports = "\n".join(f"import {package}; print({package}.__file__)" for package in PACKAGES)
    assert run([python, "-c", imports], empty).split() == [str(library / name / "__init__.py") for name in PACKAGES]

    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    # Few clips where the demo's data set is looked for; it makes 320 where there are none.
    run([fresh / "bin" / "tgmae-data", "shapes", "data/shapes", "--count", "24"], empty, **home)
    train = [fresh / "bin" / "tgmae-train", "--max-steps", "3", "--log.metrics-every", "1", "--log.picture-every", "3"]
    run([*train, "--device", "cpu"], empty, **home)

    made = empty / "runs" / "demo"
    assert [path.name for path in (made / "checkpoints").iterdir()] == ["step_00000003.pt"]
    assert (made / "hf" / "config.json").is_file()
    assert (made / "hf" / "model.safetensors").is_file()
    assert list((made / "pictures").glob("*.png"))
    steps = [json.loads(line)["step"] for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3]  # the last one has a validation, too
