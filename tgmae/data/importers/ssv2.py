"""Something-Something V2: short videos of hands and things, each with a sentence and the template it was made from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dali_pipelines.types import Caption
from tgmae.data.importers.official_files import FormatError, NoListError, OfficialFiles
from tgmae.data.importers.samples import Dataset, Sample, check_labels

_PREFIX = r"(?:something-something-v2-)?"  # which the first release has
_SPLITS = {"train": "train", "validation": "val", "test": "test"}


def _read(files: OfficialFiles) -> list[Sample]:
    listed = files.find(_PREFIX + r"labels\.json", "labels.json, which names the classes")
    classes = set(files.read_json(listed, dict, "an object from classes to numbers"))
    if files.find_optional(_PREFIX + r"train\.json") is None:
        raise NoListError(f"{files.folder} holds no train.json, with a sentence and a template for each video")
    answers = _read_answers(files)
    samples: list[Sample] = []
    outside: list[tuple[str, str]] = []
    for name, split in _SPLITS.items():
        if (path := files.find_optional(rf"{_PREFIX}{name}\.json")) is None:
            files.notes.append(f"there is no {name}.json, so that no video is in split {split}")
            continue
        records = files.read_records(path, ["id"] if split == "test" else ["id", "label", "template"])
        for record in records:
            video = str(record["id"])
            label = answers.get(video, "") if split == "test" else _strip(str(record["template"]))
            if label not in classes and (label or split != "test"):
                outside.append((f"{path.name}, id {video}", label))
            samples.append(Sample(video, label, split, _read_captions(record)))
    check_labels(outside, f"the {len(classes)} classes of {listed.name}")
    return samples


def _strip(template: str) -> str:
    """Return the class: "Holding [something]" is called "Holding something" in labels.json."""
    return template.replace("[", "").replace("]", "")


def _read_captions(record: dict[str, Any]) -> tuple[Caption, ...]:
    """Return the sentence of a video: its template with the things that were at hand."""
    text = str(record.get("label", "")).strip()
    return (Caption(text, "human"),) if text else ()


def _read_answers(files: OfficialFiles) -> dict[str, str]:
    path: Path | None = files.find_optional(_PREFIX + r"test-answers\.csv")
    if path is None:
        return {}
    answers = {}
    for where, line in files.read_lines(path):
        video, separator, label = line.partition(";")
        if not separator:
            raise FormatError(f"{path.parent / where}: expected an ID, a semicolon and a class, got {line[:80]!r}")
        answers[video.strip()] = _strip(label.strip().strip('"'))
    return answers


SSV2 = Dataset(
    title="Something-Something V2",
    example="78687.webm",
    stem=re.compile(r"\d{1,6}"),
    lists=((_PREFIX + r"(train|validation)\.json", '"template"'), (r"something-something-v2-.*\.json", "")),
    published={"train": 168_913, "val": 24_777, "test": 27_157},
    num_classes=174,
    source="Qualcomm's page of the data set",
    read=_read,
)
