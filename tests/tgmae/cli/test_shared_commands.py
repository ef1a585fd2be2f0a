"""Commands of tgmae-data that several processes share: the same files as one process writes, and one report."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dali_pipelines.types import Video
from tests.support.videos import write_numbered
from tgmae.data.earlier_index import open_journal
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import read_manifest

REPOSITORY = Path(__file__).resolve().parents[3]
DATA = ("-m", "tgmae.cli.data")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = pytest.mark.slow


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
    )  # fmt: skip


def srun(size: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start processes with the environment that srun gives them."""
    step = {
        "SLURM_JOB_ID": str(random.SystemRandom().randrange(10_000)), "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(size), "SLURM_STEP_NODELIST": "localhost",
    }  # fmt: skip
    return [start(*arguments, **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(size)]


def wait_for(*processes: subprocess.Popen[str]) -> tuple[list[int], list[str]]:
    """Return the exit codes and what was printed."""
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(7):
        write_numbered(tmp_path / "in" / f"{number}.mp4", num_frames=16 + number)
    for name in ("2b.mp4", "4b.mp4"):
        (tmp_path / "in" / name).write_bytes(b"\0 is not a video" * 100)
    return tmp_path


def test_three_processes_index_like_one(folder: Path) -> None:
    """Byte for byte. What a process left behind that was killed is not probed again."""
    index_folder(folder / "in", folder / "one.parquet", num_workers=1)
    with open_journal(folder / "three.parquet.7.journal", folder / "in") as note:  # the last of eight processes
        note(read_manifest(folder / "one.parquet")[3])
    flags = ("index", folder / "in", "--out", folder / "three.parquet", "--workers", 1)
    codes, outputs = wait_for(*srun(3, *DATA, *flags))
    assert codes == [0, 0, 0], outputs
    for end in ("", ".excluded.csv"):
        assert (folder / f"three.parquet{end}").read_bytes() == (folder / f"one.parquet{end}").read_bytes()
    assert not list(folder.glob("*.journal"))
    assert "7 videos (1 unchanged), 2 left out" in outputs[0]
    assert [outputs[0].count(f"left out {name}.mp4") for name in ("2b", "4b")] == [1, 1]
    assert outputs[1:] == ["", ""]


def row_of(video: Video) -> Video:
    return replace(video, mtime_ns=0)  # when the video was encoded


def test_one_process_makes_up_for_a_killed_one_of_two(tmp_path: Path) -> None:
    """Compacting: what either process had finished stays as it is, and the videos are those that one process writes."""
    for number in range(8):
        write_numbered(tmp_path / "in" / f"{number}.mp4", num_frames=60)
    index_folder(tmp_path / "in", tmp_path / "m.parquet", num_workers=1)
    flags = ("compact", tmp_path / "m.parquet", "--short-side", 64, "--workers", 1, "--out")
    out, deadline = tmp_path / "out", time.monotonic() + 60
    first, second = srun(2, *DATA, *flags, out)
    journal = out / "compact.1.journal"
    while not (journal.exists() and b"\n" in journal.read_bytes()):
        assert time.monotonic() < deadline, "wrote no journal"
        time.sleep(0.01)
    second.kill()
    codes, outputs = wait_for(first, second)
    assert codes == [1, -signal.SIGKILL], outputs
    assert outputs[0].endswith("rank 0 of 2 ends because another one has ended; its message says why\n")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("[0246].mp4")}
    assert len(kept) == 4  # the first one's share
    num_done = 4 + journal.read_bytes().count(b"\n")
    codes, outputs = wait_for(*(start(*DATA, *flags, folder) for folder in (out, tmp_path / "one")))
    assert codes == [0, 0], outputs
    assert f"8 videos ({num_done} done before), 0 left out" in outputs[0]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [path.name for path in out.glob("*.journal")] == ["compact.journal"]

    manifests = [read_manifest(folder / "manifest.parquet") for folder in (out, tmp_path / "one")]
    shared, alone = ([row_of(manifest[row]) for row in range(len(manifest))] for manifest in manifests)
    assert shared == alone
    for video in alone:
        assert (out / video.path).read_bytes() == (tmp_path / "one" / video.path).read_bytes()


MAPS = """
import json, sys
from pathlib import Path
from dali_pipelines.workers.team import join_team
from tests.tgmae.masks.test_map_writer import write
from tgmae.data.manifest import read_manifest
with join_team() as team:
    result, computed = write(read_manifest(Path(sys.argv[1])), Path(sys.argv[2]), broken=(2, 5), team=team)
skipped = [video.row for video in result.skipped]
print(json.dumps([result.num_videos, result.num_reused, skipped, result.num_bytes, computed]))
"""


def test_two_processes_write_the_maps_of_one(tmp_path: Path) -> None:
    """Each its own parts; the result of both is the main process's."""
    for number in range(10):
        write_numbered(tmp_path / "in" / f"{number}.mp4", num_frames=2)
    index_folder(tmp_path / "in", tmp_path / "m.parquet", min_frames=1, num_workers=1)
    codes, outputs = wait_for(
        *srun(2, "-c", MAPS, tmp_path / "m.parquet", tmp_path / "two"),
        start("-c", MAPS, tmp_path / "m.parquet", tmp_path / "one"),
    )
    assert codes == [0, 0, 0], outputs
    first, second, one = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert one[:3] == [8, 0, [2, 5]]
    assert first == [*one[:4], [0, 1, 2, 3, 8, 9]]
    assert second[4] == [4, 5, 6, 7]
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("show", "gone.parquet"), "show is for one process, not 2; run it without torchrun or srun"),
        (("motion", "gone.parquet"), "no manifest at gone.parquet; make one with"),
    ],
)
def test_what_is_wrong_is_said_once(flags: tuple[str, ...], message: str) -> None:
    codes, outputs = wait_for(*srun(2, *DATA, *flags))
    assert codes == [1, 1]
    assert outputs[0].startswith("tgmae-data: " + message)
    assert outputs[1] == "tgmae-data: rank 1 of 2 ends because another one has ended; its message says why\n"


def test_help_ends_all_processes() -> None:
    codes, [output] = wait_for(start(*TORCHRUN, *DATA, "index", "--help"))
    assert codes == [0], output
    assert output.count("usage: tgmae-data index FOLDER") == 1


def test_ctrl_c_is_answered_once(tmp_path: Path) -> None:
    for number in range(8):
        write_numbered(tmp_path / "in" / f"{number}.mp4", num_frames=40, width=320, height=240)
    index_folder(tmp_path / "in", tmp_path / "m.parquet", num_workers=1)
    flags = ("compact", tmp_path / "m.parquet", "--codec", "vp9", "--short-side", 224, "--workers", 1, "--out")
    process = start(*TORCHRUN, *DATA, *flags, tmp_path / "out")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*.tmp")):
        assert time.monotonic() < deadline, "began nothing"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    codes, [output] = wait_for(process)
    assert codes == [1]
    assert output.count("tgmae-data: ") == output.count("interrupted; run the same command again to continue") == 1
