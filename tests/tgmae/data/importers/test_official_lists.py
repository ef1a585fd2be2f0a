"""Each importer against its official files, or files of their format with the official classes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dali_pipelines.types import Caption
from tests.tgmae.data.importers.official import annotations_folder, stand_in
from tgmae.data.importers.datasets import DATASETS
from tgmae.data.importers.epic55 import make_epic55
from tgmae.data.importers.names import DatasetName, LabelKind
from tgmae.data.importers.official_files import OfficialFiles
from tgmae.data.importers.samples import Sample, compare, drop_repeats, join_splits
from tgmae.data.manifest import count_splits


def read(name: DatasetName, folder: Path) -> tuple[dict[str, Sample], OfficialFiles]:
    files = OfficialFiles(stand_in(name, folder).annotations)
    samples, _ = drop_repeats(DATASETS[name].read(files))
    return {sample.name: sample for sample in samples}, files


def test_ssv2_has_sentences_templates_and_answers(tmp_path: Path) -> None:
    samples, files = read("ssv2", tmp_path / "labels")
    assert samples["78687"] == Sample(
        "78687", "Holding something next to something", "train",
        (Caption("holding a cup next to café 78687", "human"),),
    )  # fmt: skip
    assert (samples["2"].split, samples["2"].label) == ("val", "Pushing something from left to right")
    assert samples["3"] == Sample("3", "Holding something next to something", "test")
    assert files.notes == []


def test_ssv2_has_every_official_class(tmp_path: Path) -> None:
    """The classes of labels.json are templates without their brackets."""
    labels = (annotations_folder("ssv2") / "label_map.txt").read_text().splitlines()
    listed = OfficialFiles(annotations_folder("ssv2"))
    found = listed.read_json(listed.find(r"labels\.json", "labels"), dict, "classes")
    assert sorted(found) == sorted(labels)
    assert len(found) == DATASETS["ssv2"].num_classes


def test_k400_tells_the_clips_of_its_three_lists(tmp_path: Path) -> None:
    samples, files = read("k400", tmp_path / "k400")
    assert Counter(sample.split for sample in samples.values()) == {"train": 4, "val": 2, "test": 1}
    assert samples["---QUuC4vJs from 84 s"] == Sample("---QUuC4vJs", "abseiling", "train", clip_start=84)
    assert samples["__TEST_0001 from 2 s"].label == ""
    assert files.notes == []


def test_ucf101_is_as_published(tmp_path: Path) -> None:
    samples, files = read("ucf101", tmp_path)
    assert len(samples) == 13_320
    assert count_splits(sample.split for sample in samples.values()) == DATASETS["ucf101"].published
    assert len({sample.label for sample in samples.values()}) == 101
    assert samples["v_ApplyEyeMakeup_g01_c01"] == Sample(
        "v_ApplyEyeMakeup_g01_c01", "ApplyEyeMakeup", "test,test1,train2,train3"
    )
    assert files.notes == []


def test_hmdb51_is_as_published(tmp_path: Path) -> None:
    samples, files = read("hmdb51", tmp_path)
    assert len(samples) == 6_766
    counts = count_splits(sample.split for sample in samples.values())
    assert {name: number for name, number in counts.items() if name} == DATASETS["hmdb51"].published
    assert len({sample.label for sample in samples.values()}) == 51
    assert samples["AMADEUS_sit_u_nm_np1_fr_med_4"].split.startswith("test,test1")
    assert files.notes == []
    # Counted here once more, by other means: 0 is unused.
    lines = (annotations_folder("hmdb51") / "sit_test_split2.txt").read_text().split("\n")
    unused = [line.split()[0][:-4] for line in lines if line.strip().endswith(" 0")]
    assert unused
    assert not [name for name in unused if {"train2", "test2"} & set(samples[name].split.split(","))]


def test_diving48_names_classes_by_its_vocabulary(tmp_path: Path) -> None:
    samples, files = read("diving48", tmp_path / "diving")
    classes = (annotations_folder("diving48") / "label_map.txt").read_text().split()
    assert [sample.label for sample in samples.values()] == [classes[at] for at in (0, 16, 32, 47)]
    assert Counter(sample.split for sample in samples.values()) == {"train": 3, "test": 1}
    assert len(classes) == DATASETS["diving48"].num_classes
    assert files.notes == []


@pytest.mark.parametrize(("kind", "label"), [("action", "turn-on light"), ("verb", "turn-on"), ("noun", "light")])
def test_epic55_is_as_published(kind: LabelKind, label: str) -> None:
    dataset = make_epic55(kind)
    files = OfficialFiles(annotations_folder("epic55"))
    lines = dataset.read(files)
    assert len(lines) == dataset.published["train"] == 28_472
    assert len({sample.label for sample in lines}) == dataset.num_classes
    assert lines[1] == Sample("P01_01", label, "train", (Caption("turn on light", "human"),), (4.37, 6.17))
    samples, note = drop_repeats(lines)
    assert len(samples) == 28_470
    assert note == "2 lines repeat others, and count once: P07_10 1361.00-1361.50 s, P22_12 67.09-73.09 s"
    assert [note.split()[3] for note in files.notes] == ["EPIC_test_s1_timestamps.csv,", "EPIC_test_s2_timestamps.csv,"]


def test_epic55_reads_the_tests_where_they_are(tmp_path: Path) -> None:
    for path in annotations_folder("epic55").glob("*.csv"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "EPIC_test_s2_timestamps.csv").write_text(
        "uid,participant_id,video_id,start_timestamp,stop_timestamp,start_frame,stop_frame\n"
        "15582,P09,P09_01,00:00:01.970,00:00:03.090,118,185\n"
    )
    last = make_epic55("action").read(OfficialFiles(tmp_path))[-1]
    assert last == Sample("P09_01", "", "test_s2", (), (1.97, 3.09))


def test_the_first_split_has_a_plain_name_too() -> None:
    assert join_splits({2: "train", 1: "test", 3: "train"}) == "test,test1,train2,train3"
    assert join_splits({3: "test"}) == "test3"
    assert join_splits({}) == ""


def test_what_differs_from_the_published_numbers_is_said() -> None:
    dataset = DATASETS["diving48"]
    samples = [Sample(str(number), f"class {number % 48}", "train") for number in range(15_027)]
    assert compare(dataset, samples) == (
        "Diving48 V2: train 15,027; 48 classes; published are test 1,970 "
        "(the released lists of Li et al. 2018, version 2)"
    )
    samples += [Sample(f"t{number}", "class 0", "test") for number in range(1_970)]
    assert "; as published (" in compare(dataset, samples)
    assert "; published are train 15,027, 48 classes (" in compare(
        dataset, [s for s in samples if s.label != "class 1"]
    )
