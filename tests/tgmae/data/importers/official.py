"""Annotation folders of published data sets and stand-ins for their videos, under the official names.

Where the original files may be copied they are; the others are written in their format, from the official classes.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.videos import real_data_folder, write_numbered

_K400_HEADER = ("label", "youtube_id", "time_start", "time_end", "split")


@dataclass(frozen=True)
class StandIn:
    """An imported data set for tests: its official lists, and videos that stand in for some of those they name."""

    name: str
    annotations: Path
    videos: tuple[str, ...]  # paths below the folder of videos
    codec: str = "libx264"
    num_frames: int = 18

    def write_videos(self, root: Path) -> Path:
        """Write the first video, 64 pixels wide, and copy it under the names of the others."""
        first, *others = (root / path for path in self.videos)
        write_numbered(first, self.codec, num_frames=self.num_frames, width=64, height=64, g="8")
        for other in others:
            other.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(first, other)
        return root


def annotations_folder(name: str) -> Path:
    """Folder of official annotation files; the test is skipped where it is not there."""
    data = real_data_folder()
    if data is None or not (data / "annotations" / name).is_dir():
        pytest.skip(f"no official annotation files of {name}: set TGMAE_REAL_DATA")
    return data / "annotations" / name


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[Sequence[object]], **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)  # type: ignore[arg-type]
    return path


def ssv2_record(number: int, template: str, *things: str) -> dict[str, object]:
    """Return a line of train.json, whose sentence is the template with these things."""
    sentence = template
    for thing in things:
        sentence = sentence.replace("[something]", thing, 1)
    return {"id": str(number), "label": sentence.lower(), "template": template, "placeholders": list(things)}


def write_ssv2(folder: Path) -> StandIn:
    """Write lists of six videos in the format of the release, with the official classes."""
    shutil.copytree(annotations_folder("ssv2"), folder, ignore=shutil.ignore_patterns("*.md"))
    holding, pushing = "Holding [something] next to [something]", "Pushing [something] from left to right"
    train = [ssv2_record(number, holding, "a cup", f"café {number}") for number in (78687, 42326, 100904)]
    write_json(folder / "train.json", [*train, ssv2_record(1, pushing, "a pen")])
    write_json(folder / "validation.json", [ssv2_record(2, pushing, "a box")])
    write_json(folder / "test.json", [{"id": "3"}])
    (folder / "test-answers.csv").write_text("3;Holding something next to something\n")
    return StandIn("ssv2", folder, tuple(f"{n}.webm" for n in (78687, 42326, 100904, 1, 2, 3)), "libvpx-vp9")


def write_k400(folder: Path) -> StandIn:
    """Write lists of seven videos in the format of the release, whose copies have the names met in the field."""
    classes = annotations_folder("kinetics") / "label_map_k400.txt"
    folder.mkdir()
    shutil.copy(classes, folder)
    train = [
        ("abseiling", "---QUuC4vJs", 84, 94, "train"), ("air drumming", "-_nQbRBEz2s", 104, 114, "train"),
        ("zumba", "0123456789_", 0, 10, "train"), ("zumba", "zumba-video", 5, 15, "train"),
    ]  # fmt: skip
    write_csv(folder / "train.csv", [_K400_HEADER, *train])
    validate = [("abseiling", "__VALIDATE1", 7, 17, "validate"), ("yoga", "__VALIDATE2", 1, 11, "validate")]
    write_csv(folder / "validate.csv", [_K400_HEADER, *validate])
    write_csv(folder / "test.csv", [_K400_HEADER[1:], ("__TEST_0001", 2, 12, "test")])
    return StandIn(
        "k400",
        folder,
        (
            "train/abseiling/---QUuC4vJs_000084_000094.mp4", "train/air_drumming/-_nQbRBEz2s.mp4",
            "train/0123456789_.mp4", "zumba/zumba-video_000005_000015.mp4", "val/__VALIDATE1_000007_000017.mp4",
            "test/__TEST_0001_000002_000012.mp4",
        ),
    )  # fmt: skip


def official_ucf101() -> StandIn:
    names = [f"v_{name}.avi" for name in ("ApplyEyeMakeup_g01_c01", "ApplyEyeMakeup_g08_c01", "YoYo_g25_c05")]
    paths = ("ApplyEyeMakeup/" + names[0], "ApplyEyeMakeup/" + names[1], "YoYo/" + names[2])
    more = ("HandstandPushups/v_HandStandPushups_g08_c01.avi", "Archery/v_Archery_g09_c01.avi")
    return StandIn("ucf101", annotations_folder("ucf101"), (*paths, *more), "mpeg4")


def official_hmdb51() -> StandIn:
    """The lists of HMDB51; a clip of train and one of test of split 1, one unused there, and a name with signs."""
    paths = (
        "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_1.avi",
        "sit/AMADEUS_sit_u_nm_np1_fr_med_4.avi", "sit/A_Beautiful_Mind_3_sit_f_cm_np1_fr_med_6.avi",
    )  # fmt: skip
    return StandIn("hmdb51", annotations_folder("hmdb51"), paths, "mpeg4")


def write_diving48(folder: Path) -> StandIn:
    """Write lists of four videos in the format of the release, with the official classes."""
    classes = (annotations_folder("diving48") / "label_map.txt").read_text().split()
    write_json(folder / "Diving48_vocab.json", [name.split("+") for name in classes])
    names = [f"-mmq0PT-u8k_{number:05d}" for number in (155, 156, 157, 158)]
    lines = [
        {"vid_name": name, "label": 16 * at, "start_frame": 0, "end_frame": 18} for at, name in enumerate(names[:3])
    ]
    write_json(folder / "Diving48_V2_train.json", lines)
    write_json(folder / "Diving48_V2_test.json", [{**lines[0], "vid_name": names[3], "label": 47}])
    return StandIn("diving48", folder, tuple(f"rgb/{name}.mp4" for name in names))


def official_epic55() -> StandIn:
    """The lists of EPIC-KITCHENS; a video of 8.8 s, into which four segments begin."""
    return StandIn("epic55", annotations_folder("epic55"), ("P01/P01_01.MP4",), num_frames=220)


def write_first_of_epic55(folder: Path, num_lines: int = 40) -> StandIn:
    """Write the first lines of the list of EPIC-KITCHENS, beside its classes."""
    whole = official_epic55()
    folder.mkdir()
    for name in ("EPIC_verb_classes.csv", "EPIC_noun_classes.csv"):
        shutil.copy(whole.annotations / name, folder)
    name = "EPIC_train_action_labels.csv"
    lines = (whole.annotations / name).read_text().split("\n")
    (folder / name).write_text("\n".join(lines[: num_lines + 1]))
    return replace(whole, annotations=folder)


def stand_in(name: str, folder: Path) -> StandIn:
    """Return a data set; `folder` is where lists that may not be copied are written."""
    writers = {"ssv2": write_ssv2, "k400": write_k400, "diving48": write_diving48}
    official = {"ucf101": official_ucf101, "hmdb51": official_hmdb51, "epic55": official_epic55}
    return writers[name](folder) if name in writers else official[name]()
