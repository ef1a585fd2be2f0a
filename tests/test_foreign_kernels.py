"""Hugging Face's package `kernels` beside tgmae's own: importing tgmae ends with one sentence that says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
THEIRS = "raise RuntimeError('this package must not run')\n"  # theirs takes seconds to import, and may fail


def install_ours(folder: Path) -> None:
    """Put as much of tgmae into a folder as `import tgmae` reads."""
    for package in ("tgmae", "kernels"):
        (folder / package).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / package / "__init__.py", folder / package)


def install_theirs(folder: Path) -> None:
    """Put a package with the layout of Hugging Face's kernels 0.17.2 into a folder, as pip does."""
    (folder / "kernels").mkdir(parents=True, exist_ok=True)
    (folder / "kernels" / "__init__.py").write_text(THEIRS)
    (folder / "kernels" / "layer.py").touch()
    (folder / "kernels-0.17.2.dist-info").mkdir()


def import_tgmae(*path: Path) -> str:
    """Import tgmae with these folders in front of the standard library; return the last line that it ends with."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    # -S leaves site-packages out, where an editable install of tgmae or the real package might be.
    command = [sys.executable, "-S", "-c", "import tgmae, kernels; print(tgmae.__file__, kernels.__file__)"]
    done = subprocess.run(command, cwd=path[0], env=environment, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines()[-1]


def test_ours_alone(tmp_path: Path) -> None:
    install_ours(tmp_path)
    assert import_tgmae(tmp_path) == f"{tmp_path}/tgmae/__init__.py {tmp_path}/kernels/__init__.py"


def test_ours_before_theirs_on_the_path(tmp_path: Path) -> None:
    """In a checkout, for example. Both packages are whole, and tgmae finds its own."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    install_ours(ours)
    install_theirs(theirs)
    assert import_tgmae(ours, theirs) == f"{ours}/tgmae/__init__.py {ours}/kernels/__init__.py"


def test_theirs_before_ours_on_the_path(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    install_ours(ours)
    install_theirs(theirs)
    message = import_tgmae(theirs, ours)
    assert message.startswith("ImportError: tgmae needs its own package `kernels`, and Python finds another one, ")
    assert f"another one, {theirs}/kernels/__init__.py (" in message
    assert "Hugging Face" in message
    assert "pip uninstall kernels" in message


def test_theirs_installed_over_ours(tmp_path: Path) -> None:
    install_ours(tmp_path)
    install_theirs(tmp_path)
    message = import_tgmae(tmp_path)
    assert message.startswith("ImportError: tgmae needs its own package `kernels`, and Python finds another one, ")
    assert "pip uninstall kernels" in message


def test_ours_installed_over_theirs(tmp_path: Path) -> None:
    install_theirs(tmp_path)
    install_ours(tmp_path)
    message = import_tgmae(tmp_path)
    assert message.startswith("ImportError: tgmae's package `kernels` overwrote Hugging Face's kernels-0.17.2 in ")
    assert "pip uninstall kernels" in message


@pytest.mark.parametrize("folder_left", [True, False])
def test_theirs_uninstalled_after_it_overwrote_ours(folder_left: bool, tmp_path: Path) -> None:
    """pip takes the shared __init__.py away, and the folder with it where nothing else is in it."""
    install_ours(tmp_path)
    (tmp_path / "kernels" / "__init__.py").unlink()
    if not folder_left:
        (tmp_path / "kernels").rmdir()
    found = "one without __init__.py" if folder_left else "none"
    message = import_tgmae(tmp_path)
    assert message.startswith(f"ImportError: tgmae needs its own package `kernels`, and Python finds {found}")
    assert "with --force-reinstall --no-deps" in message
