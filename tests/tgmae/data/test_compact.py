"""Compacting a data set: rows, names and boxes are carried over; runs are refused, killed and resumed."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dali_pipelines.video.decode import decode_frames
from tests.support.faults.flips import TryFlips
from tests.support.videos import make_video, real_data_folder, write_numbered
from tgmae.cli.data import main
from tgmae.data.compact import (
    JOURNAL,
    CompactConfig,
    CompactResult,
    _Job,
    _read_journal,
    _run_jobs,
    compact,
    name_results,
)
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.data.probing import Excluded
from tgmae.shapes.truth import read_objects

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = CompactConfig(short_side=64)


def index(root: Path, **options: Any) -> Manifest:
    """Of all videos below `root`; the manifest lies in it."""
    index_folder(root, root / "manifest.parquet", num_workers=1, min_frames=1, **options)
    return read_manifest(root / "manifest.parquet")


def digests(folder: Path) -> dict[str, str]:
    """Of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Rows, names, boxes


@pytest.mark.slow
def test_rows_are_carried_over(tmp_path: Path) -> None:
    """Labels, captions and splits; a.avi and a.mp4 keep their suffixes in the name; the originals stay as they are."""
    root = tmp_path / "in"
    for name, codec in (("x/a.mp4", "libx264"), ("x/a.avi", "mpeg4"), ("y/a.webm", "libvpx-vp9")):
        write_numbered(root / name, codec, num_frames=16)
    (root / "list.csv").write_text(
        "path,label,split,caption,caption2\nx/a.mp4,l1,train,one,\nx/a.avi,l2,val,two,three\ny/a.webm,,test,,\n"
    )
    manifest, before = index(root, csv_path=root / "list.csv"), digests(root)
    result = compact(manifest, tmp_path / "out", SMALL, 2)
    made = read_manifest(result.manifest)
    videos = [made[row] for row in range(len(made))]
    assert [(v.path, v.label, v.texts, v.split) for v in videos] == [
        ("x/a.mp4.mp4", "l1", ("one",), "train"),
        ("x/a.avi.mp4", "l2", ("two", "three"), "val"),
        ("y/a.mp4", "", (), "test"),
    ]
    assert result.rows == (0, 1, 2)
    assert made.root == tmp_path / "out"
    assert digests(root) == before
    assert not list((tmp_path / "out").rglob("*.tmp"))

    (root / "list.csv").write_text("path,label,split,caption\nx/a.avi,new,val,other\ny/a.webm,,test,\nx/a.mp4,,,\n")
    again = compact(index(root, csv_path=root / "list.csv"), tmp_path / "out", SMALL, 1)
    made = read_manifest(again.manifest)
    assert again.num_reused == 3  # what is said of the videos is no reason to encode them again
    assert (made[0].path, made[0].label, made[0].texts) == ("x/a.avi.mp4", "new", ("other",))


def test_names_do_not_collide() -> None:
    videos = [make_video(path=path) for path in ("a.avi", "b/a.avi", "c.MP4")]
    assert name_results(videos, ".mp4") == {
        "a.avi": "a.mp4", "b/a.avi": "b/a.mp4", "c.MP4": "c.mp4",
    }  # fmt: skip
    paths = ["a.avi", "a.mp4", "a.avi.mkv", "a.avi.mp4.mov", "b.webm"]
    names = name_results([make_video(path=path) for path in paths], ".mp4")
    assert len(set(names.values())) == len(paths)
    assert (names["a.avi"], names["b.webm"]) == ("a.avi.mp4", "b.mp4")


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_the_longest_names(tmp_path: Path, codec: Any) -> None:
    """Names of 255 bytes: the temporary file's and the result's must not be longer, and must not collide."""
    root = tmp_path / "in"
    names = [f"{'あ' * 83}x.mp4", "x" * 250 + "a.mp4", "x" * 250 + "b.mp4", "x" * 249 + ".mkv"]
    whole = write_numbered(root / "plain.mkv", num_frames=8)
    for name in names:
        shutil.copy(whole, root / name)
    whole.unlink()
    manifest, config = index(root), replace(SMALL, codec=codec)
    result = compact(manifest, tmp_path / "out", config, 1)
    assert not result.excluded
    made = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".mp4", ".webm")]
    assert len(made) == len(names)
    assert all(len(path.name.encode()) <= 255 for path in made)
    assert (
        compact(read_manifest(root / "manifest.parquet"), tmp_path / "out", replace(SMALL, codec=codec), 1).num_reused
        == 4
    )
    cut = name_results([make_video(path=name, segment=(3, 9)) for name in names], ".mp4")
    assert len(set(cut.values())) == len(names)
    assert all(len(name.encode()) <= 255 and name.endswith(".mp4") for name in cut.values())


@pytest.fixture
def few_shapes(shapes: Path, tmp_path: Path) -> Manifest:
    """Three shapes clips, in a folder with the boxes of all."""
    root = tmp_path / "shapes"
    (root / "videos").mkdir(parents=True)
    manifest = read_manifest(shapes)
    for row in (0, 3, 4):
        os.link(manifest.file(row), root / manifest[row].path)
    os.link(shapes.parent / "boxes.parquet", root / "boxes.parquet")
    write_manifest(root / "manifest.parquet", [manifest[row] for row in (0, 3, 4)], root)
    return read_manifest(root / "manifest.parquet")


@pytest.mark.parametrize("options", [{"stride": 4}, {"fps": 10.0}])
def test_boxes_follow_size_and_frames(few_shapes: Manifest, tmp_path: Path, options: dict[str, Any]) -> None:
    out = tmp_path / "out"
    compact(few_shapes, out, CompactConfig(short_side=60, codec="vp9", **options), 1)
    before = {row["path"]: row for row in pq.read_table(few_shapes.root / "boxes.parquet").to_pylist()}
    after = pq.read_table(out / "boxes.parquet").to_pylist()
    made = read_manifest(out / "manifest.parquet")
    assert [row["path"] for row in after] == [made[row].path for row in range(3)]
    frames = range(0, 40, 4) if "stride" in options else [n * 5 // 2 for n in range(16)]
    for row in after:
        source = before[row["path"].replace(".webm", ".mp4")]
        assert {name: row[name] for name in ("caption", "color", "shape", "motion")} == {
            name: source[name] for name in ("caption", "color", "shape", "motion")
        }
        expected = [
            [left // 2, top * 64 // 120, -(-right // 2), -(-bottom * 64 // 120)]  # 160×120 has become 80×64
            for left, top, right, bottom in (source["boxes"][frame] for frame in frames)
        ]
        assert row["boxes"] == expected
    with pytest.raises(ValueError, match="does not say which seed its clips were drawn from"):
        read_objects(out)


def test_objects_of_a_shapes_set_of_unchanged_pictures(few_shapes: Manifest, tmp_path: Path) -> None:
    compact(few_shapes, tmp_path / "out", CompactConfig(align=2), 1)
    made = read_manifest(tmp_path / "out" / "manifest.parquet")
    objects = read_objects(tmp_path / "out")
    assert list(objects) == [made[row].path for row in range(3)]
    assert all(made[row].texts == (objects[made[row].path][0].caption,) for row in range(3))


# Bad files


@pytest.mark.slow
def test_bad_sources_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_numbered(root / "good.mp4", num_frames=16)
    damaged = write_numbered(root / "damaged.mp4", num_frames=120, g="12", crf="10")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    damaged.write_bytes(content)
    for name in ("gone.mp4", "replaced.mp4"):
        write_numbered(root / name, num_frames=16)
    manifest = index(root)
    (root / "gone.mp4").unlink()
    write_numbered(root / "replaced.mp4", num_frames=30)
    rows = [manifest[row] for row in range(len(manifest))]
    longer = [replace(video, num_frames=17) if video.path == "good.mp4" else video for video in rows]

    result = compact(manifest, tmp_path / "out", SMALL, 1)
    made = read_manifest(result.manifest)
    assert [made[row].path for row in range(len(made))] == ["good.mp4"]
    assert result.rows == (2,)
    reasons = {excluded.path: excluded.reason for excluded in result.excluded}
    assert set(reasons) == {"damaged.mp4", "gone.mp4", "replaced.mp4"}
    assert "Invalid data" in reasons["damaged.mp4"]
    assert "No such file" in reasons["gone.mp4"]
    assert "changed since it was indexed" in reasons["replaced.mp4"]
    with result.report.open(newline="") as file:
        assert list(csv.reader(file)) == [["path", "reason"], *([e.path, e.reason] for e in result.excluded)]
    assert result.report == tmp_path / "out" / "manifest.parquet.excluded.csv"
    assert not (tmp_path / "out" / "damaged.mp4").exists()

    write_manifest(root / "manifest.parquet", longer, root)
    with pytest.raises(ValueError, match=r"none of 4 videos is usable; .*excluded\.csv lists why:\n"):
        compact(read_manifest(root / "manifest.parquet"), tmp_path / "none", SMALL, 1)
    assert "ends before frame 16" in (tmp_path / "none" / "manifest.parquet.excluded.csv").read_text()


# Refusals


def test_folders_that_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "data" / "in"
    write_numbered(root / "a.mp4", num_frames=2)
    manifest, before = index(root), digests(tmp_path)
    for out in (root, root.parent, tmp_path):
        with pytest.raises(ValueError, match="expected a folder apart from the originals"):
            compact(manifest, out, SMALL, 1)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").touch()
    with pytest.raises(ValueError, match="which holds files"):
        compact(manifest, full, SMALL, 1)
    with pytest.raises(ValueError, match="got the file"):
        compact(manifest, full / "notes.txt", SMALL, 1)
    assert {name: digest for name, digest in digests(tmp_path).items() if name != "full/notes.txt"} == before

    compact(manifest, tmp_path / "out", SMALL, 1)
    with pytest.raises(ValueError, match=r"was made with short_side 64 \(now 32\), gop 12 \(now 6\); use another"):
        compact(manifest, tmp_path / "out", CompactConfig(short_side=32, gop=6), 1)


# Second runs and interruptions


def stamps(out: Path) -> dict[str, int]:
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*.mp4")}


@pytest.mark.slow
def test_second_run_encodes_what_changed(tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    for name in ("a", "b", "c"):
        write_numbered(root / f"{name}.mp4", num_frames=16)
    compact(index(root), out, SMALL, 1)
    before, manifest_time = stamps(out), (out / "manifest.parquet").stat().st_mtime_ns
    again = compact(read_manifest(root / "manifest.parquet"), out, SMALL, 1)
    assert (again.num_reused, again.rows) == (3, (0, 1, 2))
    assert stamps(out) == before
    assert (out / "manifest.parquet").stat().st_mtime_ns == manifest_time

    write_numbered(root / "b.mp4", num_frames=20)
    (out / "c.mp4").write_bytes(b"")
    (out / "d.mp4.123.tmp").touch()
    result = compact(index(root), out, SMALL, 1)
    assert result.num_reused == 1
    after = stamps(out)
    assert [name for name in after if after[name] == before[name]] == ["a.mp4"]
    made = read_manifest(out / "manifest.parquet")
    assert [made[row].num_frames for row in range(3)] == [16, 20, 16]
    assert not list(out.rglob("*.tmp"))


def interrupt(root: Path, out: Path, until: Callable[[], bool], number: signal.Signals) -> str:
    """Start tgmae-data compact in a process of its own, send a signal as soon as `until` holds; returns stderr."""
    flags = ["--out", str(out), "--short-side", "64", "--workers", "1"]
    command = [sys.executable, "-m", "tgmae.cli.data", "compact", str(root / "manifest.parquet"), *flags]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit "ignore"
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not until():
            assert process.poll() is None, "ended before it could be interrupted"
            assert time.monotonic() < deadline, "wrote no journal"
            time.sleep(0.005)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()
        _, errors = process.communicate(timeout=120)
        return errors
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def in_journal(out: Path) -> list[str]:
    """Sources that the journal names as done."""
    text = (out / JOURNAL).read_text() if (out / JOURNAL).exists() else ""
    return [json.loads(line.partition("\t")[0])[0] for line in text.splitlines()[1:] if re.search(r"\]\t.{8}$", line)]


@pytest.fixture(scope="module")
def long_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two quick videos, then some that take a while."""
    root = tmp_path_factory.mktemp("long")
    for name in ("a0", "a1"):
        write_numbered(root / f"{name}.mp4", num_frames=16)
    slow = write_numbered(root / "b0.mp4", num_frames=250, width=960, height=720, preset="ultrafast", crf="20")
    for number in range(1, 4):
        os.link(slow, root / f"b{number}.mp4")
    index(root)
    return root


@pytest.mark.slow
def test_killed_run_is_resumed(long_work: Path, tmp_path: Path) -> None:
    """What was done stays, the rest follows, and all is as one run would have made it."""
    out = tmp_path / "out"
    half_written: list[Path] = []

    def under_way() -> bool:
        half_written[:] = out.rglob("*.tmp")
        return len(in_journal(out)) >= 2 and any("b" in path.name and path.stat().st_size for path in half_written)

    interrupt(long_work, out, under_way, signal.SIGKILL)
    done = in_journal(out)
    assert done[:2] == ["a0.mp4", "a1.mp4"]
    assert len(done) < 6
    assert not (out / "manifest.parquet").exists()
    before = stamps(out)
    with (out / JOURNAL).open("a") as journal:
        journal.write('\n["b1.mp4", 12')  # a line cut off
    manifest = read_manifest(long_work / "manifest.parquet")
    result = compact(manifest, out, SMALL, 1)
    assert result.num_reused >= 2
    assert all(stamps(out)[name] == before[name] for name in ("a0.mp4", "a1.mp4"))

    compact(manifest, tmp_path / "whole", SMALL, 2)
    videos = {name: digest for name, digest in digests(out).items() if name.endswith(".mp4")}
    assert videos == {n: digest for n, digest in digests(tmp_path / "whole").items() if n.endswith(".mp4")}
    rows = [read_manifest(folder / "manifest.parquet") for folder in (out, tmp_path / "whole")]
    assert [replace(rows[0][n], mtime_ns=0) for n in range(6)] == [replace(rows[1][n], mtime_ns=0) for n in range(6)]
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(long_work: Path, tmp_path: Path) -> None:
    errors = interrupt(long_work, tmp_path / "out", lambda: len(in_journal(tmp_path / "out")) >= 2, signal.SIGINT)
    assert "interrupted; run the same command again to continue" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "suffix"), [("h264", ".mp4"), ("vp9", ".webm")])
def test_runs_give_the_same_bytes(tmp_path: Path, codec: Any, suffix: str) -> None:
    write_numbered(tmp_path / "in" / "a.mp4", num_frames=30)
    manifest = index(tmp_path / "in")
    for name in ("one", "two"):
        compact(manifest, tmp_path / name, replace(SMALL, codec=codec), 1)
    assert digests(tmp_path / "one")[f"a{suffix}"] == digests(tmp_path / "two")[f"a{suffix}"]


@pytest.mark.slow
def test_full_disk_is_no_fault_of_the_video(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    write_numbered(tmp_path / "in" / "a.mp4", num_frames=60)
    index(tmp_path / "in")
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000));"
        "from tgmae.cli.data import main; sys.argv[0] = 'tgmae-data'; main()"
    )
    flags = [str(tmp_path / "in" / "manifest.parquet"), "--out", str(tmp_path / "out"), "--quality", "5"]
    done = subprocess.run(
        [sys.executable, "-c", limited, "compact", *flags, "--workers", "1"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"File too large: .*a\.mp4", done.stderr), done.stderr
    assert "left out" not in done.stderr


def test_no_flipped_bit_in_the_journal_is_silent(tmp_path: Path, try_flips: TryFlips) -> None:
    """A damaged line costs its video another encoding; damaged settings are refused."""
    write_numbered(tmp_path / "in" / "a.mp4", num_frames=16)
    compact(index(tmp_path / "in"), tmp_path / "out", SMALL, 1)
    journal = tmp_path / "out" / JOURNAL
    settings = json.loads(journal.read_bytes().split(b"\n")[0])
    whole = _read_journal(journal, settings)
    assert len(whole) == 1

    def read() -> object:
        found = _read_journal(journal, settings)
        if not found:
            raise ValueError("dropped")
        return found

    flips = try_flips(journal, read)
    assert {"dropped"} < flips.messages
    assert flips.refused > 0.9 * flips.tried


# The command


@pytest.mark.slow
def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    for name in ("a", "b"):
        write_numbered(root / f"{name}.mp4", num_frames=40)
    manifest = index(root)
    (root / "gone.mp4").touch()
    flags = ["--out", str(out), "--short-side", "60", "--stride", "2", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["tgmae-data", "compact", str(root / "manifest.parquet"), *flags])
    main()
    printed = capsys.readouterr().out
    assert "2 videos (0 done before), 0 left out" in printed
    for words in ("frames/s", "clips/s", "size, MiB", "bits per pixel"):
        assert words in printed
    report = json.loads((out / "compact.json").read_text())
    assert (report["before"]["frames"], report["after"]["frames"]) == (80, 40)
    assert report["before"]["bytes"] == sum(manifest[row].num_bytes for row in range(2))
    assert report["after"]["hours"] == pytest.approx(report["before"]["hours"])
    assert report["settings"]["stride"] == 2
    assert all(len(report[when][name]) == 3 for when in ("before", "after") for name in ("frames_per_s", "clips_per_s"))
    main()
    assert "nothing was left to do" in capsys.readouterr().out

    elsewhere = tmp_path / "elsewhere" / "manifest.parquet"
    elsewhere.parent.mkdir()
    write_manifest(elsewhere, [manifest[0]], root)
    monkeypatch.setattr(sys, "argv", ["tgmae-data", "compact", str(elsewhere), "--out", str(elsewhere.parent)])
    with pytest.raises(SystemExit, match="--out must not be the folder of the manifest"):
        main()
    monkeypatch.setattr(sys, "argv", ["tgmae-data", "compact", str(elsewhere), "--out", str(out), "--gop", "0"])
    with pytest.raises(SystemExit, match="--stride and --gop must be at least 1"):
        main()


# Real files


@pytest.mark.slow
def test_real_videos(tmp_path: Path) -> None:
    """10 bit, full range, AV1, HEVC, turned and cut-off recordings: same frames, colours within two levels."""
    data = real_data_folder()
    if data is None:
        pytest.skip("no real videos: set TGMAE_REAL_DATA")
    index_folder(data / "videos" / "misc", tmp_path / "manifest.parquet", min_frames=1, num_workers=1)
    manifest = read_manifest(tmp_path / "manifest.parquet")
    result: CompactResult = compact(manifest, tmp_path / "out", CompactConfig(short_side=128), 2)
    assert [excluded.path for excluded in result.excluded] == ["decord/corrupted.mp4"]
    made = read_manifest(result.manifest)
    for place, row in enumerate(result.rows):
        before, after = manifest[row], made[place]
        assert after.num_frames == before.num_frames
        assert after.keyframes == tuple(range(0, after.num_frames, 12))
        assert after.fps == pytest.approx(before.fps, rel=1e-3)
        frame = after.num_frames // 2
        means = [
            next(decode_frames(source.file(n), source[n], [frame], seek=True))[1]
            .to_ndarray(format="rgb24")
            .mean((0, 1))
            for source, n in ((manifest, row), (made, place))
        ]
        np.testing.assert_allclose(means[1], means[0], atol=2, err_msg=before.path)


class CrashingConfig(CompactConfig):
    """Ends the process that reads its codec, as a crash inside FFmpeg would."""

    def __getattribute__(self, name: str) -> object:
        if name == "codec" and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_video_that_crashes_its_process_is_left_out(num_workers: int, tmp_path: Path) -> None:
    """Found among the others by the process it kills; those are encoded all the same."""
    for number in range(6):
        write_numbered(tmp_path / "in" / f"{number}.mp4", num_frames=8)
    index_folder(tmp_path / "in", tmp_path / "manifest.parquet", min_frames=1, num_workers=1)
    manifest = read_manifest(tmp_path / "manifest.parquet")
    jobs = [
        _Job(
            row=row,
            file=manifest.file(row),
            source=manifest[row],
            out=tmp_path / "out",
            name=f"{row}.mp4",
            config=CompactConfig(),
        )
        for row in range(6)
    ]
    jobs[3] = replace(jobs[3], config=CrashingConfig())
    found = dict(_run_jobs(jobs, num_workers))
    assert sorted(found) == list(range(6))
    assert found[3] == Excluded("3.mp4", "the worker process that read it was killed by SIGKILL, 3 times")
    assert all((tmp_path / "out" / f"{row}.mp4").exists() for row in (0, 1, 2, 4, 5))
