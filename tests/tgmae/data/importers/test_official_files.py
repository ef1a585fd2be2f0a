"""Annotation files as they are met in the field: encodings, separators, quotes, damage, wrong folders."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from dali_pipelines.types import Caption
from tests.tgmae.data.importers.official import (
    annotations_folder,
    ssv2_record,
    stand_in,
    write_csv,
    write_diving48,
    write_json,
    write_k400,
    write_ssv2,
)  # fmt: skip
from tgmae.data.importers.datasets import DATASETS
from tgmae.data.importers.importing import plan_import
from tgmae.data.importers.names import DatasetName
from tgmae.data.importers.official_files import OfficialFiles
from tgmae.data.importers.samples import Sample, drop_repeats

PUSHING = "Pushing [something] from left to right"


def refuse(name: DatasetName, annotations: Path, tmp_path: Path) -> str:
    """Return what an import says of annotations that it cannot use."""
    (tmp_path / "videos").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        plan_import(name, DATASETS[name], annotations, tmp_path / "videos", tmp_path / "m.parquet")
    return str(caught.value)


def read(name: DatasetName, folder: Path) -> tuple[list[Sample], list[str]]:
    files = OfficialFiles(folder)
    return DATASETS[name].read(files), files.notes


# Encodings and separators


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_are_the_same_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    folder = write_ssv2(tmp_path / "labels").annotations
    text = (folder / "train.json").read_text(encoding="utf-8")
    (folder / "train.json").write_text(text, encoding=encoding)
    samples, notes = read("ssv2", folder)
    assert samples[0].captions == (Caption("holding a cup next to café 78687", "human"),)
    assert notes == ["train.json is UTF-16, and read so"] * (encoding == "utf-16")


def test_latin_1_is_read_and_said(tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    write_k400(folder)
    (folder / "label_map_k400.txt").unlink()
    (folder / "train.csv").write_bytes(
        "label,youtube_id,time_start,time_end,split\nyoga,00000000001,0,10,train\ncafé,00000000002,0,10,train\n".encode(
            "latin-1"
        )
    )
    samples, notes = read("k400", folder)
    assert samples[1].label == "café"
    assert notes == ["train.csv is not UTF-8, and read as Latin-1: line 3 is 'café,00000000002,0,10,train'"]


@pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_separators_and_quotes_are_read(delimiter: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "k400"
    write_k400(folder)
    (folder / "label_map_k400.txt").unlink()
    rows = [
        ("label", "youtube_id", "time_start", "time_end", "split"),
        ('say "hi"; wave, bow', "0" * 11, 1, 11, "train"),
    ]
    write_csv(folder / "train.csv", rows, delimiter=delimiter)
    samples, notes = read("k400", folder)
    assert samples[0].label == 'say "hi"; wave, bow'
    assert notes == [f"train.csv is separated by {name}, and read so"]


def test_both_names_of_the_release_are_found(tmp_path: Path) -> None:
    """SSv2's lists had a prefix once, and lie in a folder of their own."""
    folder = write_ssv2(tmp_path / "parent" / "labels").annotations
    for path in list(folder.glob("*.json")):
        path.rename(path.with_name(f"something-something-v2-{path.name}"))
    assert len(read("ssv2", tmp_path / "parent")[0]) == 6


# Damage


def test_a_cut_off_download_is_named(tmp_path: Path) -> None:
    folder = write_ssv2(tmp_path / "labels").annotations
    text = (folder / "train.json").read_bytes()
    (folder / "train.json").write_bytes(text[: len(text) // 2])
    said = refuse("ssv2", folder, tmp_path)
    assert "train.json is not JSON: " in said
    assert "it may have been cut off in a download" in said


def test_lines_that_are_not_as_they_should_be_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "k400"
    write_k400(folder)
    header = "label,youtube_id,time_start,time_end,split\n"
    for line, words in (
        ("yoga,00000000001,soon,10,train", "train.csv line 2: time_start is 'soon', expected seconds"),
        ("yoga,00000000001,0,10", r"train.csv line 2: 4 fields for 5 columns"),
        (
            'yo"ga,00000000001,0,10,train\n"yoga,00000000001,0',
            "train.csv line 3: the quotes that begin here do not end",
        ),
        ("yoga,00000000001,0,10,val", "train.csv line 2: the split is 'val' in the list of train"),
        (
            "yodel,00000000001,0,10,train",
            "1 line has a label that is not among the 400 classes of label_map_k400.txt",
        ),
    ):
        (folder / "train.csv").write_text(header + line + "\n")
        assert words in refuse("k400", folder, tmp_path)


def test_labels_outside_the_classes_are_named(tmp_path: Path) -> None:
    folder = write_ssv2(tmp_path / "labels").annotations
    write_json(folder / "train.json", [ssv2_record(5, PUSHING, "a"), ssv2_record(6, "Juggling [something]", "a")])
    said = refuse("ssv2", folder, tmp_path)
    assert "not among the 174 classes of labels.json, such as 'Juggling something' (train.json, id 6)" in said
    diving = write_diving48(tmp_path / "diving").annotations
    write_json(diving / "Diving48_V2_test.json", [{"vid_name": "a", "label": 48}])
    assert "not among the 48 classes of Diving48_vocab.json, such as '48'" in refuse("diving48", diving, tmp_path)


def test_an_id_that_is_there_twice_counts_once_or_is_refused(tmp_path: Path) -> None:
    folder = write_ssv2(tmp_path / "labels").annotations
    one = ssv2_record(5, PUSHING, "a pen")
    write_json(folder / "train.json", [one, one, ssv2_record(5, PUSHING, "a pencil")])
    samples, note = drop_repeats(read("ssv2", folder)[0])
    assert note == "2 lines repeat others, and count once: 5, 5"
    assert [caption.text for caption in samples[0].captions] == [
        f"pushing {x} from left to right" for x in ("a pen", "a pencil")
    ]
    write_json(folder / "validation.json", [one])
    assert "the lists name 5 twice, with the splits 'train' and 'val'; delete one line" in refuse(
        "ssv2", folder, tmp_path
    )


# Wrong folders


@pytest.mark.parametrize("given", ["ssv2", "k400", "ucf101", "hmdb51", "diving48", "epic55"])
def test_lists_of_another_data_set_are_recognised(given: DatasetName, tmp_path: Path) -> None:
    folder = stand_in(given, tmp_path / "lists").annotations
    for name in DATASETS:
        if name != given:
            said = refuse(name, folder, tmp_path)
            assert said.startswith(f"{DATASETS[name].title}: ")
            assert said.endswith(f"is one of {DATASETS[given].title}'s: tgmae-data import {given}"), said


def test_other_releases_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "EPIC_100_train.csv").write_text("narration_id\n")
    assert "EPIC_100_train.csv is one of EPIC-KITCHENS-100's" in refuse("epic55", tmp_path, tmp_path)
    (tmp_path / "Diving48_train.json").write_text("[]")
    assert "version 1, whose labels" in refuse("diving48", tmp_path, tmp_path)
    k600 = tmp_path / "k600"
    lines = [(f"class {number}", f"{number:011d}", 0, 10, "train") for number in range(600)]
    write_csv(k600 / "train.csv", [("label", "youtube_id", "time_start", "time_end", "split"), *lines])
    assert "has lists of 600 classes, not 400: they are of another Kinetics" in refuse("k400", k600, tmp_path)
    (k600 / "train.csv").write_text("abseiling/a.mp4 0\n")
    assert "expected a first line with youtube_id, time_start, time_end, got 'abseiling/a.mp4 0'" in refuse(
        "k400", k600, tmp_path
    )


def test_a_folder_that_is_not_there_or_is_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no labels.json, which names the classes; it holds no files" in refuse(
        "ssv2", tmp_path / "empty", tmp_path
    )
    with pytest.raises(FileNotFoundError, match=r"--annotations .*nowhere is not there"):
        plan_import("ssv2", DATASETS["ssv2"], tmp_path / "nowhere", tmp_path, tmp_path / "m.parquet")


def test_lists_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    folder = write_ssv2(tmp_path / "labels").annotations
    shutil.copytree(folder, folder / "old")
    assert re.search(
        r"labels\.json is there twice, as .* and .*; give --annotations one folder", refuse("ssv2", folder, tmp_path)
    )


def test_missing_lists_leave_their_split_out(tmp_path: Path) -> None:
    official = annotations_folder("ucf101")
    for name in ("classInd.txt", "trainlist01.txt", "testlist01.txt"):
        shutil.copy(official / name, tmp_path)
    samples, notes = read("ucf101", tmp_path)
    assert {sample.split for sample in samples} == {"train,train1", "test,test1"}
    assert len(notes) == 4
    assert notes[0] == "there is no trainlist02.txt, so that no video is in its split"
