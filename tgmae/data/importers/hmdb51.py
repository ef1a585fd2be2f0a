"""HMDB51: three splits, with a file for each class and split, in which 1 is train, 2 is test and 0 is unused."""

from __future__ import annotations

import re
from collections import defaultdict

from tgmae.data.importers.official_files import FormatError, NoListError, OfficialFiles
from tgmae.data.importers.samples import Dataset, Sample, join_splits

_LIST = r"(.+)_test_split([123])\.txt"
_CLIPS = {"train": 70, "test": 30}  # of each class in each split
_SIDES = {"0": "", "1": "train", "2": "test"}


def _read(files: OfficialFiles) -> list[Sample]:
    lists = files.find_all(_LIST)
    if not lists:
        raise NoListError(f"{files.folder} holds no files such as brush_hair_test_split1.txt")
    sides: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)  # of each video: {split: train or test}
    for match, path in lists:
        label, number = match[1], int(match[2])
        for where, line in files.read_lines(path):
            name, _, side = line.rpartition(" ")
            if side not in _SIDES or not name:
                raise FormatError(f"{where}: expected VIDEO.avi and 0, 1 or 2, got {line[:80]!r}")
            found = sides[name.strip().removesuffix(".avi"), label]
            if side != "0" and found.setdefault(number, _SIDES[side]) != _SIDES[side]:
                raise FormatError(f"{where}: {name.strip()} is in train and test of split {number}; keep one line")
    names = {path.name for _, path in lists}
    wanted = {f"{label}_test_split{number}.txt" for _, label in sides for number in (1, 2, 3)}
    if absent := sorted(wanted - names):
        files.notes.append(
            f"{len(absent)} lists are not there, such as {', '.join(absent[:3])}: their split lacks the class"
        )
    return [Sample(video, label, join_splits(found)) for (video, label), found in sides.items()]


HMDB51 = Dataset(
    title="HMDB51",
    example="April_09_brush_hair_u_nm_np1_ba_goo_0.avi",
    stem=re.compile(r".+_[flu]_(?:cm|nm)_np\d_(?:ba|fr|le|ri)_(?:bad|goo|med)_\d+"),
    lists=((_LIST, ""),),
    published={f"{side}{number}": count * 51 for number in ("", 1, 2, 3) for side, count in _CLIPS.items()},
    num_classes=51,
    source="the released lists of Kuehne et al. 2011: 6,766 clips, 70 and 30 of each class in each split",
    read=_read,
)
