"""The data sets that can be imported, and recognising which one a folder is of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from tgmae.data.importers.diving48 import DIVING48
from tgmae.data.importers.epic55 import make_epic55
from tgmae.data.importers.hmdb51 import HMDB51
from tgmae.data.importers.k400 import K400
from tgmae.data.importers.names import DatasetName
from tgmae.data.importers.official_files import OfficialFiles
from tgmae.data.importers.samples import Dataset
from tgmae.data.importers.ssv2 import SSV2
from tgmae.data.importers.ucf101 import UCF101

DATASETS: dict[DatasetName, Dataset] = {
    "ssv2": SSV2,
    "k400": K400,
    "ucf101": UCF101,
    "hmdb51": HMDB51,
    "diving48": DIVING48,
    "epic55": make_epic55("action"),
}
_NEIGHBOURS = {r"EPIC_100_.*\.csv": "EPIC-KITCHENS-100", r"something-something-v1-.*": "Something-Something V1"}
# Names that fewer sets give come first: every number of five digits is a name of SSv2's.
_BY_NAME: tuple[DatasetName, ...] = ("ucf101", "hmdb51", "diving48", "epic55", "k400", "ssv2")
_SHARE = 0.5  # of a folder's videos that must have a set's names


def recognise_lists(files: OfficialFiles, but: DatasetName) -> str:
    """Say which other data set the annotation files of a folder are of, "" where that is not known."""
    for name, dataset in DATASETS.items():
        for pattern, content in dataset.lists:
            if name != but and (file := files.shows(pattern, content)):
                return f"; {file} is one of {dataset.title}'s: tgmae-data import {name}"
    for pattern, title in _NEIGHBOURS.items():
        if file := files.shows(pattern, ""):
            return f"; {file} is one of {title}'s, which cannot be imported"
    return ""


def recognise_videos(paths: Iterable[str], but: DatasetName) -> str:
    """Say whose names the videos of a folder have, "" where they are nobody's."""
    stems = [PurePosixPath(path).stem for path in paths]
    fits = Counter(
        {name: sum(re.fullmatch(DATASETS[name].stem, stem) is not None for stem in stems) for name in _BY_NAME}
    )
    for name in _BY_NAME:
        if fits[name] > _SHARE * len(stems):
            whose = "its own" if name == but else f"{DATASETS[name].title}'s"
            return f"; they have names such as {whose}"
    return ""
