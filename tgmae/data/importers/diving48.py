"""Diving48, in the corrected labels of version 2: take-off, somersaults, twists and position of dives."""

from __future__ import annotations

import re

from tgmae.data.importers.official_files import FormatError, NoListError, OfficialFiles
from tgmae.data.importers.samples import Dataset, Sample, check_labels


def _read(files: OfficialFiles) -> list[Sample]:
    lists = {match[1].lower(): path for match, path in files.find_all(r"Diving48_V2_(train|test)\.json")}
    if not lists and files.find_all(r"Diving48_(train|test)\.json"):
        raise FormatError(
            f"{files.folder} holds version 1, whose labels its authors have corrected; take Diving48_V2_*.json"
        )
    if not lists:
        raise NoListError(f"{files.folder} holds no Diving48_V2_train.json and Diving48_V2_test.json")
    listed = files.find(r"Diving48_vocab\.json", "Diving48_vocab.json, which names the classes")
    vocabulary = files.read_json(listed, list, "a list with the parts of each class")
    classes = ["+".join(map(str, parts)) for parts in vocabulary]
    samples: list[Sample] = []
    outside = []
    for split in ("train", "test"):
        if split not in lists:
            files.notes.append(f"there is no Diving48_V2_{split}.json, so that no video is in split {split}")
            continue
        # start_frame and end_frame are 0 and the length of the file: the official videos are cut already.
        for record in files.read_records(lists[split], ["vid_name", "label"]):
            video, number = str(record["vid_name"]), record["label"]
            if not isinstance(number, int) or not 0 <= number < len(classes):
                outside.append((f"{lists[split].name}, {video}", str(number)))
                continue
            samples.append(Sample(video, classes[number], split))
    check_labels(outside, f"the {len(classes)} classes of {listed.name}")
    return samples


DIVING48 = Dataset(
    title="Diving48 V2",
    example="-mmq0PT-u8k_00155.mp4",
    stem=re.compile(r"[\w-]{11}_\d{5}"),
    lists=((r"Diving48_(?:V2_)?(?:train|test)\.json", ""), (r"Diving48_vocab\.json", "")),
    published={"train": 15_027, "test": 1_970},
    num_classes=48,
    source="the released lists of Li et al. 2018, version 2",
    read=_read,
)
