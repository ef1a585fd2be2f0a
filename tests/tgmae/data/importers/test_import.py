"""`tgmae-data import` as a user meets it: what it finds, what it says is missing, and training on the result."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dali_pipelines.types import Caption, Video
from dali_pipelines.video.decode import decode_frames, to_rgb
from tests.support.clip_models import save_small_clip
from tests.support.videos import make_video, read_number, write_numbered
from tests.tgmae.data.importers.official import (
    StandIn,
    stand_in,
    write_csv,
    write_first_of_epic55,
    write_k400,
    write_ssv2,
)
from tgmae.cli.data import main
from tgmae.cli.train import main as train
from tgmae.data.earlier_index import open_journal
from tgmae.data.importers.datasets import DATASETS
from tgmae.data.importers.importing import plan_import
from tgmae.data.importers.matching import match_videos
from tgmae.data.importers.names import DatasetName
from tgmae.data.importers.samples import Sample
from tgmae.data.listing import Entry
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.data.probing import describe_far_keyframes, probe
from tgmae.telemetry.metrics import read_metrics

TINY = shlex.split(
    "--device cpu --pipeline pyav --batch-size 2 --device-batch-size 2 --max-steps 5 "
    "--model.image-size 32 --model.patch-size 8 --model.num-frames 4 --model.width 24 --model.depth 1 "
    "--model.num-heads 1 --model.decoder-width 24 --model.decoder-depth 1 --model.decoder-num-heads 1 "
    "--log.no-tensorboard --log.no-progress --log.picture-every 1000 --log.metrics-every 1 --validation.clips 1"
)


class Importing:
    """Runs `tgmae-data import` in this process, in a folder of its own; returns what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, data: StandIn, videos: Path, *flags: object) -> str:
        arguments = [data.name, "--annotations", data.annotations, "--videos", videos, "--workers", 1, *flags]
        self.monkeypatch.setattr(sys, "argv", ["tgmae-data", "import", *map(str, arguments)])
        self.capsys.readouterr()
        try:
            main()
        except SystemExit as left:
            return left.code if isinstance(left.code, str) else self.capsys.readouterr().err
        return self.capsys.readouterr().out


@pytest.fixture
def importing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Importing:
    monkeypatch.chdir(tmp_path)
    return Importing(monkeypatch, capsys)


def rows_of(path: Path) -> dict[str, Video]:
    return {video.name: video for video in read_manifest(path).rows()}


def write_empty(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


# Finding the files


def match(name: DatasetName, samples: list[Sample], *paths: str) -> tuple[dict[str, str], list[str]]:
    """Return {name of the sample: file} and why others were not found."""
    found = match_videos(DATASETS[name], [replace(s, label=s.name) for s in samples], paths)
    return {entry.label: entry.path for entry in found.entries}, [clip.reason for clip in found.missing]


@pytest.mark.parametrize(
    "path",
    [
        "---QUuC4vJs_000084_000094.mp4", "---QUuC4vJs.mp4", "train/abseiling/---QUuC4vJs_000084_000094.mkv",
        "k400/air drumming/---QUuC4vJs.webm", "air_drumming/---QUuC4vJs_84_94.mp4", "---QUuC4vJs_000084.mp4",
    ],
)  # fmt: skip
def test_copies_of_k400_are_found_by_their_id(path: str) -> None:
    sample = Sample("---QUuC4vJs", "", "train", clip_start=84)
    assert match("k400", [sample], "other.mp4", path) == ({sample.name: path}, [])


def test_another_clip_of_the_same_video_is_not_taken() -> None:
    """Kinetics-600 and 700 cut other seconds from the same videos."""
    sample = Sample("---QUuC4vJs", "", "train", clip_start=84)
    assert match("k400", [sample], "---QUuC4vJs_000010_000020.mp4") == (
        {}, ["only ---QUuC4vJs_000010_000020.mp4 is there, another clip of that video"]
    )  # fmt: skip
    assert match("k400", [sample], "---quuc4vjs.mp4") == ({}, ["no file of that name"])  # IDs have capitals


def test_a_file_is_taken_once_and_the_surest_name_wins() -> None:
    sample, other = (Sample("---QUuC4vJs", "", "train", clip_start=start) for start in (84, 10))
    exact = "z/---QUuC4vJs_000084_000094.mp4"
    assert match("k400", [sample], "a/---QUuC4vJs.mp4", exact)[0] == {sample.name: exact}
    found, missing = match("k400", [sample, other], "a/---QUuC4vJs.mp4")
    assert (found, missing) == ({sample.name: "a/---QUuC4vJs.mp4"}, ["a/---QUuC4vJs.mp4 is taken for another line"])


def test_other_names_may_differ_in_capitals_and_composition() -> None:
    assert match("epic55", [Sample("P01_01", "", "")], "rgb/p01_01.mp4")[0] == {"P01_01": "rgb/p01_01.mp4"}
    assert match("hmdb51", [Sample("caf\u00e9_sit", "", "")], "cafe\u0301_sit.avi")[0] == {
        "caf\u00e9_sit": "cafe\u0301_sit.avi"
    }


def test_what_is_there_twice_or_in_no_list_is_said(tmp_path: Path) -> None:
    data = write_ssv2(tmp_path / "labels")
    videos = write_empty(tmp_path / "v", "1.webm", "a/78687.webm", "b/78687.webm", "b/555.webm", "b/own.mp4")
    plan = plan_import("ssv2", DATASETS["ssv2"], data.annotations, videos, tmp_path / "m.parquet")
    assert plan.lines[1:] == [
        "found 2 of 6 videos", "1 video is there more than once; of a/78687.webm and b/78687.webm the first is taken",
        "2 other videos are in no list, and are left out: b/555.webm, b/own.mp4",
    ]  # fmt: skip
    assert [clip.path for clip in plan.missing] == ["42326", "100904", "2", "3"]


def test_names_that_are_not_utf_8_are_escaped(tmp_path: Path) -> None:
    data = write_ssv2(tmp_path / "labels")
    videos = write_empty(tmp_path / "v", "caf\udce9/555.webm")
    with pytest.raises(ValueError, match=r"other videos \(caf\\udce9/555\.webm\)"):
        plan_import("ssv2", DATASETS["ssv2"], data.annotations, videos, tmp_path / "m.parquet")
    write_empty(videos, "caf\udce9/1.webm")
    plan = plan_import("ssv2", DATASETS["ssv2"], data.annotations, videos, tmp_path / "m.parquet")
    assert plan.lines[-1] == "1 other video is in no list, and is left out: caf\\udce9/555.webm"


# Wrong folders


def test_a_folder_of_other_videos_is_recognised(importing: Importing, tmp_path: Path) -> None:
    data = write_ssv2(tmp_path / "labels")
    videos = write_empty(tmp_path / "v", "YoYo/v_YoYo_g01_c01.avi", "YoYo/v_YoYo_g01_c02.avi", "readme.txt")
    assert importing(data, videos) == (
        f"tgmae-data: none of Something-Something V2's videos is below {videos}: looked for files such as 78687.webm, "
        "for 6 lines from 78687 on; it holds 2 other videos (YoYo/v_YoYo_g01_c01.avi, YoYo/v_YoYo_g01_c02.avi); they "
        "have names such as UCF101's; give the right folder with --videos"
    )
    frames = write_empty(tmp_path / "frames", "78687/000001.jpg", "78687/000002.jpg")
    assert "it holds 2 other files (.jpg 2), and no videos" in importing(data, frames)
    assert "nowhere is not there" in importing(data, tmp_path / "nowhere")
    assert "--label verb has no effect with ssv2, only with epic55" in importing(data, frames, "--label", "verb")


# Writing manifests


def test_missing_videos_are_counted_and_listed(importing: Importing, tmp_path: Path) -> None:
    data = write_ssv2(tmp_path / "labels")
    write_numbered(tmp_path / "v" / "78687.webm", "libvpx-vp9", num_frames=18, width=64, height=64)
    (tmp_path / "v" / "42326.webm").write_bytes(b"not a video" * 100)
    said = importing(data, tmp_path / "v")
    missing = Path("data/ssv2/manifest.parquet.missing.csv")
    assert f"found 2 of 6 videos\n4 clips are missing (100904, 1, 2, …); {missing} lists them\n" in said
    assert missing.read_text().splitlines()[:2] == ["clip,split,reason", "100904,train,no file of that name"]
    assert "data/ssv2/manifest.parquet: 1 video (0 unchanged), 1 left out" in said
    assert said.endswith("\ntrain with: tgmae-train ssv2\n")
    assert "1 video (1 unchanged)" in importing(data, tmp_path / "v")


def test_captions_from_elsewhere_are_not_dropped(importing: Importing, tmp_path: Path) -> None:
    data = write_ssv2(tmp_path / "labels")
    write_numbered(tmp_path / "v" / "78687.webm", "libvpx-vp9", num_frames=18, width=64, height=64)
    importing(data, tmp_path / "v", "--out", "m.parquet")
    [row] = read_manifest(Path("m.parquet")).rows()
    write_manifest(
        Path("m.parquet"), [replace(row, captions=(*row.captions, Caption("a hand", "blip2")))], tmp_path / "v"
    )
    assert importing(data, tmp_path / "v", "--out", "m.parquet") == (
        "tgmae-data: m.parquet holds captions that an import would drop (1 from blip2); write elsewhere with --out, or "
        "delete it first"
    )


def test_segments_of_one_file_are_placed_by_time(importing: Importing, tmp_path: Path) -> None:
    """The frame numbers in the lists are at 60 frames a second; the file has 25."""
    data = write_first_of_epic55(tmp_path / "lists")
    videos = data.write_videos(tmp_path / "v")
    said = importing(data, videos, "--label", "verb")
    out = Path("data/epic55/manifest.parquet")
    rows = list(read_manifest(out).rows())
    # 0.14 to 3.37 s, 4.37 to 6.17 s, and 6.98 to 9.49 s, of 8.8 s.
    assert [(row.start, row.end, row.label, row.texts) for row in rows] == [
        (4, 85, "open", ("open door",)), (110, 155, "turn-on", ("turn on light",)),
        (175, 220, "close", ("close door",)),
    ]  # fmt: skip
    assert {caption.source for row in rows for caption in row.captions} == {"human"}
    assert "1 segment cut where the file ends" in said
    assert "found 1 of 1 videos (" in said
    assert "begins at 12.77 s, and the file ends at 8.80 s" in Path(f"{out}.excluded.csv").read_text()
    # Each row has the keyframes from which its clips start, and describes the whole file otherwise.
    assert rows[0].keyframes[:2] == (0, 8)
    assert rows[2].keyframes == (0, 160, 168, 176, 184, 192, 200, 208, 216)
    assert {row.num_frames for row in rows} == {220}
    for row in rows:
        ends = decode_frames(str(videos / row.path), row, (row.start, row.end - 1), seek=True)
        assert [(number, read_number(to_rgb(frame))) for number, frame in ends] == [
            (row.start, row.start), (row.end - 1, row.end - 1)
        ]  # fmt: skip
    assert "3 videos (3 unchanged)" in importing(data, videos)
    again = [replace(row, label=old.label) for row, old in zip(read_manifest(out).rows(), rows, strict=True)]
    assert again == rows
    # An import that was killed has noted whole files, of which all segments are made.
    whole = probe(videos / rows[0].path, Entry(rows[0].path, "", (), ""), 1, False)
    assert isinstance(whole, Video)
    out.unlink()
    with open_journal(out.with_name(f"{out.name}.journal"), videos) as note:
        note(whole)
    assert "3 videos (3 unchanged)" in importing(data, videos)
    labels = [row.label for row in read_manifest(out).rows()]
    assert labels == ["open cupboard", "turn-on light", "close cupboard"]  # the noun's class, which holds doors too


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ((0.0, 1.6), (0, 40)), ((0.1, 0.5), (3, 13)), ((0.04, 0.08), (1, 2)), ((1.5, 9.0), (38, 40)),
        ((1.6, 9.0), "begins at 1.60 s, and the file ends at 1.60 s"),
        ((0.41, 0.43), "holds no frame at 25 frames a second"),
    ],
)  # fmt: skip
def test_a_span_holds_the_frames_shown_within_it(span: tuple[float, float], expected: object) -> None:
    """Frame n of 25 a second is shown from n / 25 s on."""
    entry = Entry("walk/a.mp4", "", (), "", span)
    assert entry.find_segment(make_video()) == expected
    if isinstance(expected, tuple):
        assert expected == tuple(
            next(n for n in range(41) if n == 40 or n / 25 >= seconds - 1e-9) for seconds in span
        )  # fmt: skip
    assert entry.find_segment(make_video(fps=0.0)) == "its frame rate is unknown, so that seconds name no frames"


def test_keyframes_far_before_a_segment_are_not_far_from_its_clips() -> None:
    numbers = tuple(range(0, 5000, 50))
    video = make_video(num_frames=5000, keyframes=numbers, keyframe_pts=numbers)
    row = Entry(video.path, "", (), "", (100.0, 110.0)).cut(video)
    assert isinstance(row, Video)
    assert row.keyframes == (0, 2450, *range(2500, 2750, 50))
    assert describe_far_keyframes(Manifest.of([row], Path())) == ""
    sparse = replace(video, keyframes=(0, 1500), keyframe_pts=(0, 1500))
    rows = [Entry(video.path, "", (), "", span).cut(sparse) for span in ((10.0, 20.0), (100.0, 110.0))]
    said = describe_far_keyframes(Manifest.of([row for row in rows if isinstance(row, Video)], Path()))
    assert "as in walk/a.mp4#2500-2750 (1,250 frames);" in said


# From the lists to training


@pytest.mark.slow
@pytest.mark.parametrize("name", list(DATASETS))
def test_an_imported_data_set_is_trained_on(
    name: DatasetName, importing: Importing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that the import prints runs as it stands; flags behind it make it small."""
    data = stand_in(name, tmp_path / "lists")
    videos = data.write_videos(tmp_path / "my videos, mit Umlaut ä")
    said = importing(data, videos)
    rows = rows_of(Path(f"data/{name}/manifest.parquet"))
    expected = {
        "ssv2": ("tgmae-train ssv2", 6, "78687.webm", ("train", "Holding something next to something")),
        "k400": (
            "tgmae-train k400 --mask.no-caption label", 6, "train/0123456789_.mp4", ("train", "zumba")
        ),
        "ucf101": (
            "tgmae-train ucf101 --validation.split test --mask.no-caption label", 5,
            "HandstandPushups/v_HandStandPushups_g08_c01.avi", ("train,train1,test2,train3", "HandstandPushups"),
        ),
        "hmdb51": (
            "tgmae-train ucf101 --data.manifest data/hmdb51/manifest.parquet --run-dir runs/hmdb51 "
            "--validation.split test --mask.no-caption label", 4,
            "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", ("train,train1,train2,test3", "brush_hair"),
        ),
        "diving48": (
            "tgmae-train k400 --data.manifest data/diving48/manifest.parquet --run-dir runs/diving48 "
            "--validation.split test --mask.no-caption label", 4,
            "rgb/-mmq0PT-u8k_00155.mp4", ("train", "Back+15som+05Twis+FREE"),
        ),
        "epic55": (
            "tgmae-train ssv2 --data.manifest data/epic55/manifest.parquet --run-dir runs/epic55", 3,
            "P01/P01_01.MP4#4-85", ("train", "open cupboard"),
        ),
    }  # fmt: skip
    line, num_rows, path, (split, label) = expected[name]
    assert said.endswith(f"train with: {line}\n")
    assert len(rows) == num_rows
    assert (rows[path].split, rows[path].label) == (split, label)
    save_small_clip(tmp_path / "clip")
    program, *flags = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [program, *flags, *TINY, "--clip.model", str(tmp_path / "clip")])
    monkeypatch.setattr("tgmae.train._draw", lambda *_: None)
    train()
    lines = read_metrics(Path("runs") / name)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert lines[-1]["skipped_videos"] == 0


@pytest.mark.slow
def test_k400_without_a_split_or_labels_is_trained_on_what_is_there(importing: Importing, tmp_path: Path) -> None:
    data = write_k400(tmp_path / "lists")
    write_numbered(tmp_path / "v" / "__TEST_0001.mp4", num_frames=18, width=64, height=64)
    (data.annotations / "train.csv").unlink()
    said = importing(data, tmp_path / "v", "--out", "m.parquet")
    assert "there is no train.csv, so that no video is in split train" in said
    assert said.endswith(
        "train with: tgmae-train k400 --data.manifest m.parquet --data.split test --mask.no-caption exclude\n"
    )
    header = ("label", "youtube_id", "time_start", "time_end", "split")
    write_csv(data.annotations / "test.csv", [header, ("yoga", "__TEST_0001", 2, 12, "test")])
    assert importing(data, tmp_path / "v", "--out", "m.parquet").endswith(
        " --data.split test --mask.no-caption label\n"
    )
