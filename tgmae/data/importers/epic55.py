"""EPIC-KITCHENS-55: long videos of cooking; each narrated action is a segment, and its narration a caption."""

from __future__ import annotations

import re
from functools import partial

from dali_pipelines.types import Caption
from tgmae.data.importers.names import LabelKind
from tgmae.data.importers.official_files import FormatError, OfficialFiles, Row
from tgmae.data.importers.samples import Dataset, Sample, check_labels

# Labels that occur in the released EPIC_train_action_labels.csv. The lists of classes have 125 verbs and 352 nouns.
_NUM_CLASSES: dict[LabelKind, int] = {"action": 2_513, "verb": 119, "noun": 321}
_TIME = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")
_SPAN = ["video_id", "start_timestamp", "stop_timestamp"]
_TESTS = {"test_s1": r"EPIC_test_s1_timestamps\.csv", "test_s2": r"EPIC_test_s2_timestamps\.csv"}


def _read(kind: LabelKind, files: OfficialFiles) -> list[Sample]:
    path = files.find(r"EPIC_train_action_labels\.csv", "EPIC_train_action_labels.csv")
    classes = {}
    for part in ("verb", "noun"):
        listed = files.find(rf"EPIC_{part}_classes\.csv", f"EPIC_{part}_classes.csv, which names the classes")
        rows = files.read_table(listed, [f"{part}_id", "class_key"])
        classes[part] = {row.cells[f"{part}_id"]: row.cells["class_key"] for row in rows}
    samples: list[Sample] = []
    outside = []
    for row in files.read_table(path, [*_SPAN, "narration", "verb_class", "noun_class"]):
        keys = {part: classes[part].get(row.cells[f"{part}_class"]) for part in classes}
        outside += [(row.where, f"{part} {row.cells[f'{part}_class']}") for part, key in keys.items() if key is None]
        label = " ".join(str(keys[part]) for part in keys if kind in (part, "action"))
        narration = row.cells["narration"]
        captions = (Caption(narration, "human"),) if narration else ()
        samples.append(Sample(row.cells["video_id"], label, "train", captions, _read_span(row)))
    check_labels(outside, f"the {len(classes['verb'])} verbs and {len(classes['noun'])} nouns of the lists of classes")
    for split, pattern in _TESTS.items():
        if (timed := files.find_optional(pattern)) is None:
            files.notes.append(f"there is no EPIC_{split}_timestamps.csv, so that no segment is in split {split}")
            continue
        rows = files.read_table(timed, _SPAN)
        samples += [Sample(row.cells["video_id"], "", split, (), _read_span(row)) for row in rows]
    return samples


def _read_span(row: Row) -> tuple[float, float]:
    """Return the seconds of a segment. Frame numbers beside them count 60 a second, which the videos do not have."""
    seconds = []
    for name in ("start_timestamp", "stop_timestamp"):
        if not (match := _TIME.fullmatch(row.cells[name])):
            raise FormatError(f"{row.where}: {name} is {row.cells[name]!r}, expected HH:MM:SS.ss")
        seconds.append(3600 * int(match[1]) + 60 * int(match[2]) + float(match[3]))
    if seconds[1] <= seconds[0]:
        raise FormatError(f"{row.where}: the segment ends at {seconds[1]} s, before it begins at {seconds[0]} s")
    return seconds[0], seconds[1]


def make_epic55(kind: LabelKind) -> Dataset:
    """Describe the data set with verbs, nouns or both as labels."""
    return Dataset(
        title="EPIC-KITCHENS-55",
        example="P01_01.MP4",
        stem=re.compile(r"P\d\d_\d{2,3}"),
        lists=((r"EPIC_(?:train|test|verb|noun)_.*\.csv", ""),),
        published={"train": 28_472},
        num_classes=_NUM_CLASSES[kind],
        source="the released lists of Damen et al. 2018, which say nothing of the tests",
        read=partial(_read, kind),
    )
