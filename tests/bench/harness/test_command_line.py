"""Worker processes of a benchmark start without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BENCHMARK = """
from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from bench.harness.command_line import run_from_shell
from dali_pipelines.workers.processes import make_pool


@dataclass(frozen=True)
class Options:
    pass


def run(options: Options) -> None:
    assert "torch" in sys.modules
    with make_pool(1) as pool:
        assert not pool.submit(eval, "{'torch', 'tyro'} & __import__('sys').modules.keys()").result()


if __name__ == "__main__":
    run_from_shell(run, Options, None)
"""


def test_workers_do_not_import_the_benchmark(tmp_path: Path) -> None:
    """As `python -m bench.NAME` runs it: each decode worker would hold 800 MB of torch otherwise."""
    package = tmp_path / "bench"
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__ = [{str(package)!r}, {str(ROOT / 'bench')!r}]\n")
    (package / "light.py").write_text(BENCHMARK)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "bench.light"], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_decode_workers_are_sent_needs_no_torch() -> None:
    code = "import sys, bench.workloads.cycle, bench.rivals.decoders; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
