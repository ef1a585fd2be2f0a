"""The demo's data set is made once, whoever wants it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tgmae.data.manifest import read_manifest
from tgmae.shapes import demo


@pytest.mark.slow
def test_processes_of_a_run_make_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Locks of the kernel keep threads apart as they do processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "NUM_CLIPS", 2)
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(demo.provide_demo, demo.DEMO_MANIFEST) for _ in range(2)]:
            done.result()
    assert len(read_manifest(demo.DEMO_MANIFEST)) == 2
    assert capsys.readouterr().out.count("2 videos (0 unchanged)") == 1
