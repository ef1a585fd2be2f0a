"""UCF101: three splits of the same videos into train and test."""

from __future__ import annotations

import re
from collections import defaultdict

from tgmae.data.importers.official_files import FormatError, NoListError, OfficialFiles
from tgmae.data.importers.samples import Dataset, Sample, check_labels, join_splits

_LINE = re.compile(r"(?P<label>[^/\\]+)[/\\](?P<video>[^/\\\s]+?)(?:\.\w+)?(?:\s+(?P<number>\d+))?")
_LIST = r"(train|test)list0([123])\.txt"


def _read(files: OfficialFiles) -> list[Sample]:
    listed = files.find(r"classInd\.txt", "classInd.txt, which numbers the classes")
    classes = {}
    for where, line in files.read_lines(listed):
        if not (pair := re.fullmatch(r"(\d+)\s+(\w+)", line)):
            raise FormatError(f"{where}: expected a number and a class, got {line[:80]!r}")
        classes[pair[2]] = pair[1]
    lists = files.find_all(_LIST)
    if not lists:
        raise NoListError(f"{files.folder} holds no trainlist01.txt and testlist01.txt")
    sides: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)  # of each video: {split: train or test}
    outside = []
    for match, path in lists:
        side, number = match[1].lower(), int(match[2])
        for where, line in files.read_lines(path):
            if not (parts := _LINE.fullmatch(line)):
                raise FormatError(f"{where}: expected CLASS/VIDEO.avi and perhaps a number, got {line[:80]!r}")
            label = parts["label"]
            if label not in classes or parts["number"] not in (None, classes[label]):
                outside.append((where, f"{label} {parts['number'] or ''}".strip()))
            known = sides[parts["video"], label].setdefault(number, side)
            if known != side:
                raise FormatError(f"{where}: {parts['video']} is in both lists of split {number}; keep one")
    check_labels(outside, f"the {len(classes)} numbered classes of {listed.name}")
    names = {path.name.lower() for _, path in lists}
    absent = [name for n in (1, 2, 3) for name in (f"trainlist0{n}.txt", f"testlist0{n}.txt") if name not in names]
    files.notes += [f"there is no {name}, so that no video is in its split" for name in absent]
    return [Sample(video, label, join_splits(found)) for (video, label), found in sides.items()]


UCF101 = Dataset(
    title="UCF101",
    example="v_ApplyEyeMakeup_g01_c01.avi",
    stem=re.compile(r"v_\w+_g\d\d_c\d\d"),
    lists=((_LIST, ""), (r"classInd\.txt", "")),
    published={
        "train": 9_537, "test": 3_783, "train1": 9_537, "test1": 3_783, "train2": 9_586, "test2": 3_734,
        "train3": 9_624, "test3": 3_696,
    },
    num_classes=101,
    source="the released lists of Soomro et al. 2012: 13,320 clips",
    read=_read,
)  # fmt: skip
