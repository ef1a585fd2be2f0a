"""Kinetics-400: ten seconds of YouTube videos. Copies are called after the ID, with or without the seconds."""

from __future__ import annotations

import re

from tgmae.data.importers.official_files import FormatError, NoListError, OfficialFiles
from tgmae.data.importers.samples import Dataset, Sample, check_labels

_LIST = r"(?:.*[-_])?(train|val|validate|validation|test)\.csv"
_SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
_STEM = re.compile(r"([\w-]{11})(?:_(\d{1,6})(?:_\d{1,6})?)?")
_NUM_CLASSES = 400


def _read(files: OfficialFiles) -> list[Sample]:
    lists = {_SPLITS[match[1].lower()]: path for match, path in files.find_all(_LIST)}
    if len(lists) < len(found := files.find_all(_LIST)):
        names = ", ".join(str(path) for _, path in found)
        raise FormatError(f"several lists for one split: {names}; give --annotations a folder with one of each")
    if not lists:
        raise NoListError(f"{files.folder} holds no train.csv, val.csv or test.csv with a column youtube_id")
    samples = []
    for split in ("train", "val", "test"):
        if split not in lists:
            files.notes.append(f"there is no {split}.csv, so that no video is in split {split}")
            continue
        for row in files.read_table(lists[split], ["youtube_id", "time_start", "time_end"]):
            cells = row.cells
            try:
                start = int(float(cells["time_start"]))
            except ValueError as error:
                raise FormatError(f"{row.where}: time_start is {cells['time_start']!r}, expected seconds") from error
            named = cells.get("split", "").lower()
            if named and _SPLITS.get(named) != split:
                raise FormatError(f"{row.where}: the split is {named!r} in the list of {split}")
            samples.append(Sample(cells["youtube_id"], cells.get("label", ""), split, clip_start=start))
    labels = {sample.label for sample in samples if sample.label}
    if len(labels) > _NUM_CLASSES:
        raise FormatError(f"{files.folder} has lists of {len(labels)} classes, not 400: they are of another Kinetics")
    _check_classes(files, samples)
    return samples


def _check_classes(files: OfficialFiles, samples: list[Sample]) -> None:
    """Compare the labels with a list of classes, one on a line, where one lies beside the lists."""
    if (path := files.find_optional(r"label_map.*\.txt")) is None:
        return
    classes = {line.replace("_", " ") for _, line in files.read_lines(path)}
    outside = [(s.name, s.label) for s in samples if s.label and s.label.replace("_", " ") not in classes]
    check_labels(outside, f"the {len(classes)} classes of {path.name}")


def _split_stem(stem: str) -> tuple[str, int | None]:
    """Part ID_000010_000020, ID_10 and ID into the ID and the first second."""
    if not (match := _STEM.fullmatch(stem)):
        return stem, None
    return match[1], None if match[2] is None else int(match[2])


K400 = Dataset(
    title="Kinetics-400",
    example="---QUuC4vJs_000084_000094.mp4 or ---QUuC4vJs.mp4",
    stem=re.compile(r"[\w-]{11}(?:_\d{6}_\d{6})?"),
    lists=((_LIST, "youtube_id"), (r"(train|validate|val|test)\.json", '"annotations"')),
    published={"train": 246_534, "val": 19_906, "test": 39_805},
    num_classes=_NUM_CLASSES,
    source="Kay et al. 2017: 306,245 clips; their number in each list of the Common Visual Data Foundation",
    read=_read,
    split_stem=_split_stem,
)
