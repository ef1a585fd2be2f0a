"""Real videos, end to end: index a folder, train 30 steps on it with the commands a user types."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.videos import real_data_folder
from tgmae.data.manifest import read_manifest
from tgmae.telemetry.metrics import read_metrics

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# UT-Interaction: MPEG-4 in AVI, six interactions and negatives. fight_surv: H.264, 360 to 720 lines, about two seconds.
@pytest.mark.parametrize(("name", "videos", "labels"), [("ut_interaction", 218, 7), ("fight_surv", 300, 2)])
def test_index_and_train(tmp_path: Path, name: str, videos: int, labels: int) -> None:
    data = real_data_folder()
    if data is None or not (data / "videos" / name).is_dir():
        pytest.skip(f"no real videos {name}: set TGMAE_REAL_DATA")
    out = tmp_path / "manifest.parquet"
    said = run("tgmae.cli.data", "index", str(data / "videos" / name), "--out", str(out))
    assert f"{videos} videos (0 unchanged), 0 left out" in said
    manifest = read_manifest(out)
    assert len(set(manifest.table.column("label").to_pylist())) == labels

    flags = ["--data.manifest", str(out), "--run-dir", str(tmp_path / "run"), "--max-steps", "30"]
    flags += ["--batch-size", "4", "--device-batch-size", "4"]  # decoding large videos takes most of the time
    flags += ["--mask.no-caption", "label", "--clip.cache-dir", str(tmp_path / "cache")]
    said = run("tgmae.cli.train", "demo", "--pipeline", "dali", *flags, "--log.checkpoint-every", "30")
    assert "step 30 of" in said
    assert f"{videos} videos without a caption use their label" in said
    reports = read_metrics(tmp_path / "run")
    assert reports[-1]["step"] == 30
    assert reports[-1]["skipped_videos"] == 0
    assert reports[-1]["loss"] < min(1.2, reports[0]["loss"])
    assert (tmp_path / "run" / "checkpoints" / "step_00000030.pt").exists()
    assert list((tmp_path / "run" / "pictures").glob("*.png"))
