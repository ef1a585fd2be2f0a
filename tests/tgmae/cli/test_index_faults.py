"""`tgmae-data index` where it cannot write, or where another one writes: one line each, and nothing is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.faults.disks import small_disk
from tests.support.videos import write_numbered
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import read_manifest

REPOSITORY = Path(__file__).resolve().parents[3]
HOLD = """
import sys
from pathlib import Path
from engines.files import claim_file
with claim_file(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def index(*arguments: object, prepare: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tgmae.cli.data", "index", *map(str, arguments), "--workers", "1"]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120, preexec_fn=prepare
    )


@contextmanager
def another(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a process that writes `out` until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        if process.poll() is None:
            process.communicate("\n")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4"):
        write_numbered(tmp_path / "videos" / name, num_frames=16)
    return tmp_path / "videos"


def test_two_at_once(videos: Path, tmp_path: Path) -> None:
    """The second names the first and leaves; when the first has ended, or was killed, it may."""
    out = tmp_path / "m.parquet"
    left = [tmp_path / f"m.parquet.{name}1.tmp" for name in ("", "excluded.csv.")]  # by a process that was killed
    for path in left:
        path.touch()
    (tmp_path / "mine.tmp").touch()
    with another(out) as first:
        second = index(videos, "--out", out)
        assert second.returncode == 1
        told = rf"tgmae-data: process {first.pid} on .*, since .* is writing {out}; wait until it ends\n"
        assert re.fullmatch(told, second.stderr)
        with pytest.raises(BlockingIOError, match=f"process {first.pid} on .* is writing"):
            index_folder(videos, out, num_workers=1)
        assert index_folder(videos, tmp_path / "other.parquet", num_workers=1).num_videos == 2
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / "m.parquet.lock").exists()
    assert index_folder(videos, out, num_workers=1).num_videos == 2
    assert sorted(path.name for path in tmp_path.glob("m*")) == ["m.parquet", "m.parquet.excluded.csv", "mine.tmp"]


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 4, 8, 12])  # KiB, for the lock, the journal and the manifest
def test_a_full_disk(videos: Path, tmp_path: Path, room: int) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "64k"):
        out = disk / "m.parquet"
        index_folder(videos, out, num_workers=1)
        before = out.read_bytes()
        for number in range(6):
            write_numbered(videos / f"new{number}.mp4", num_frames=16)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(free - room * 1024))
        failed = index(videos, "--out", out)
        assert failed.returncode == 1, failed.stderr
        last = failed.stderr.splitlines()[-1]
        assert last.startswith("tgmae-data: [Errno 28] No space left on device: '")
        assert str(out) in last
        assert "Traceback" not in failed.stderr
        assert out.read_bytes() == before
        assert not list(disk.glob("*.tmp"))
        (disk / "filler").unlink()
        assert index_folder(videos, out, num_workers=1).num_videos == 8
        assert len(read_manifest(out)) == 8


@pytest.mark.parametrize("content", [b"path,caption\na.mp4,x\n", b"\0\0\0\x20ftypisom"])
def test_no_file_of_another_kind_is_overwritten(videos: Path, content: bytes) -> None:
    mine = videos / "a.csv"
    mine.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.csv is there and is not a manifest; choose another place with --out"):
        index_folder(videos, mine, num_workers=1)
    assert mine.read_bytes() == content
    with pytest.raises(ValueError, match=r"is a folder; give the manifest a name, such as --out .*manifest\.parquet"):
        index_folder(videos, videos, num_workers=1)


def test_a_damaged_manifest_is_made_again(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the message says that reports the damage."""
    out = tmp_path / "m.parquet"
    index_folder(videos, out, num_workers=1)
    whole = out.read_bytes()
    out.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"is damaged: .*; make it again with: tgmae-data index FOLDER --out"):
        read_manifest(out)
    assert index_folder(videos, out, num_workers=1).num_reused == 0
    assert "is not taken into account, nor its captions and labels: " in capsys.readouterr().out
    assert len(read_manifest(out)) == 2


def test_rows_of_earlier_formats_are_probed_again(videos: Path, tmp_path: Path) -> None:
    """They do not know which stream of a file is the video, or whether it is mirrored."""
    import pyarrow.parquet as pq

    from tgmae.data.manifest import FORMAT, FORMAT_KEY, ROOT_KEY

    out = tmp_path / "m.parquet"
    index_folder(videos, out, num_workers=1)
    table = pq.read_table(out)
    assert index_folder(videos, out, num_workers=1).num_reused == 2
    old = table.drop_columns(["stream", "mirrored", "digest"])
    pq.write_table(old.replace_schema_metadata({FORMAT_KEY: b"2", ROOT_KEY: table.schema.metadata[ROOT_KEY]}), out)
    assert read_manifest(out).format == 2
    assert index_folder(videos, out, num_workers=1).num_reused == 0
    assert read_manifest(out).format == FORMAT
