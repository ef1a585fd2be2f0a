"""Several manifests as one: rows know their data set and folder, names are told apart, and bad input is named."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dali_pipelines.types import Caption
from tests.support.videos import make_video
from tgmae.captions.policy import require_captions
from tgmae.cli.parser.flags import list_flags
from tgmae.cli.parser.help import describe_flag
from tgmae.cli.train import parse
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.run import InputConfig, TrainConfig
from tgmae.config.saved import from_dict, read_config, to_dict, write_config
from tgmae.data.manifest import Manifest, write_manifest
from tgmae.data.mixing.figures import SetFigures, describe_sets, describe_videos
from tgmae.data.mixing.joined import JoinedManifest, data_sets, for_each_set, join_sets, name_sets, open_data_sets

A, B = Path("a.parquet"), Path("b.parquet")


def videos(count: int, split: str = "train", caption: str = "a disc") -> list[Any]:
    captions = (Caption(caption, "csv"),) if caption else ()
    return [make_video(path=f"{number}.mp4", split=split, captions=captions) for number in range(count)]


def joined(*counts: int) -> Manifest:
    parts = [Manifest.of(videos(count), Path(f"/root{number}")) for number, count in enumerate(counts)]
    return join_sets([f"set{number}" for number in range(len(counts))], parts)


def test_rows_know_their_data_set() -> None:
    """By number, all of them, after pickling (as decode workers get them), and after a split was chosen."""
    train = Manifest.of([*videos(3), make_video(path="v.mp4", split="val")], Path("/x"))
    manifest = join_sets(["x", "y"], [train, Manifest.of([*videos(2, "val"), make_video(path="z.mp4")], Path("/y"))])
    for one in (manifest, pickle.loads(pickle.dumps(manifest))):
        assert [one.file(row) for row in (0, 3, 4, 6)] == ["/x/0.mp4", "/x/v.mp4", "/y/0.mp4", "/y/z.mp4"]
        assert [one[row].data_set for row in range(7)] == [0, 0, 0, 0, 1, 1, 1]
        assert [video.data_set for video in one.rows()] == [0, 0, 0, 0, 1, 1, 1]
    held_out = manifest.select_split("val")
    assert [held_out.file(row) for row in range(3)] == ["/x/v.mp4", "/y/0.mp4", "/y/1.mp4"]
    both = manifest.select_split("train").joined(held_out)
    assert [both.file(row) for row in range(len(both))] == [
        "/x/0.mp4", "/x/1.mp4", "/x/2.mp4", "/x/v.mp4", "/y/z.mp4", "/y/0.mp4", "/y/1.mp4",
    ]  # fmt: skip
    assert [(one.name, one.first, len(one)) for one in data_sets(both)] == [("x", 0, 4), ("y", 4, 3)]


def test_the_fingerprint_tells_where_data_sets_begin() -> None:
    assert joined(2, 2).fingerprint != joined(3, 1).fingerprint
    assert "in data sets of 3, 1" in joined(3, 1).fingerprint


def test_one_manifest_stays_as_it_is(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a.parquet", videos(2), tmp_path)
    manifest = Manifest.of(videos(2), tmp_path)
    assert join_sets(["a"], [manifest]) is manifest
    assert [(one.name, one.manifest) for one in data_sets(manifest)] == [("", manifest)]
    with pytest.raises(ValueError, match=r"^2 of 2 videos have no caption"):
        for_each_set(Manifest.of(videos(2, caption=""), tmp_path), lambda one: require_captions(one, "error"))


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["d/ssv2/manifest.parquet", "d/k400/manifest.parquet"], ("ssv2", "k400")),
        (["d/a.parquet", "d/b c.parquet"], ("a", "b_c")),
        (["x/train.parquet", "y/train.parquet"], ("x_train", "y_train")),
        (["x/a/manifest.parquet", "y/a/manifest.parquet", "z/b.parquet"], ("x_a", "y_a", "z_b")),
        (["ä/manifest.parquet", "ö.parquet"], ("ä", "ö")),
    ],
)
def test_names(paths: list[str], names: tuple[str, ...]) -> None:
    assert name_sets(list(map(Path, paths))) == names


def test_what_a_data_set_lacks_is_said_with_its_name(tmp_path: Path) -> None:
    parts = [Manifest.of(videos(2), tmp_path), Manifest.of(videos(3, "test", caption=""), tmp_path)]
    manifest = join_sets(["ssv2", "hmdb51"], parts)
    with pytest.raises(ValueError, match=r"^hmdb51: no video has split 'train', only 'test'"):
        manifest.select_split("train")
    with pytest.raises(ValueError, match=r"^hmdb51: 3 of 3 videos have no caption, such as 0\.mp4"):
        for_each_set(manifest, lambda one: require_captions(one, "error"))
    with pytest.raises(ValueError, match=r"^hmdb51: none of the 3 videos has a caption"):
        for_each_set(manifest, lambda one: require_captions(one, "exclude"))
    bare = make_video(path="bare.mp4", label="jump", captions=())
    some = [Manifest.of([*videos(2), bare], tmp_path), parts[0]]
    labelled, note = for_each_set(join_sets(["x", "y"], some), lambda one: require_captions(one, "label"))
    assert note == "x: 1 video without a caption uses its label"
    texts = [caption.text for row in labelled.captions() for caption in row]
    assert texts == ["a disc", "a disc", "jump", "a disc", "a disc"]
    assert isinstance(labelled, JoinedManifest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest": ()}, "--data.manifest needs a path"),
        (
            {"manifest": (A, Path("x/../a.parquet"))},
            r"--data.manifest names .*a.parquet 2 times; a larger share of it: ",
        ),
        ({"manifest": A, "weights": (1.0,)}, "--data.weights needs several manifests, got one; leave it out or"),
        ({"weights": (1.0, 2.0, 3.0)}, "--data.weights must have one number for each manifest, got 3 for 2"),
        ({"weights": ()}, "--data.weights must have one number for each manifest, got 0 for 2"),
        ({"weights": (1.0, 0.0)}, "--data.weights must be above 0, got 1 0; leave out the manifest of a data set that"),
        ({"weights": (1.0, -2.0)}, "--data.weights must be above 0, got 1 -2"),
        ({"weights": (1.0, math.nan)}, "--data.weights must be above 0, got 1 nan"),
        ({"weights": (1.0, math.inf)}, "--data.weights must be above 0, got 1 inf"),
        ({"root": Path("x")}, "--data.root must name one folder for each manifest, got 1 for 2"),
        ({"manifest": A, "root": (A, B)}, "--data.root must name one folder for each manifest, got 2 for 1"),
    ],
)
def test_impossible_data_sets_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"manifest": (A, B), **changes})


@pytest.mark.parametrize("name", ["scores", "motion"])
def test_folders_of_maps_are_one_for_all_or_each(name: str) -> None:
    data = DataConfig(manifest=(A, B))
    for folders, own in ((Path("x"), Path("x")), ((Path("x"), Path("y")), Path("y"))):
        config = InputConfig(data=data, mask=MaskConfig(kind="tube", ratio=0.5, **{name: folders}))  # type: ignore[arg-type]
        assert getattr(config.mask.of_data_set(1), name) == own
    three = MaskConfig(kind="tube", ratio=0.5, **{name: (A, B, Path("c"))})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"--mask.{name} must be one folder, or one for each manifest, got 3 for 2"):
        InputConfig(data=data, mask=three)


def test_typed_and_saved(tmp_path: Path) -> None:
    """Several manifests come back from a command line and from a file; one is saved as before, as a string."""
    flags = ["--data.manifest", "a.parquet", "b.parquet", "--data.weights", "1", "2.5", "--mask.scorer", "cached"]
    config, _ = parse(["ssv2", *flags, "--mask.scores", "maps"])
    assert (config.data.manifest, config.data.weights, config.mask.scores) == ((A, B), (1.0, 2.5), Path("maps"))
    several = replace(config, mask=replace(config.mask, scores=(A, B)))
    write_config(several, tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == (several, True)
    assert to_dict(parse(["ssv2", "--data.manifest", "a.parquet"])[0])["data"]["manifest"] == "a.parquet"
    plain = to_dict(config)
    plain["data"]["manifest"] = 3
    with pytest.raises(ValueError, match=r"data.manifest must be a path, as a string or a list of paths, got 3"):
        from_dict(plain, "config.json")
    del plain["data"]["weights"]  # as earlier versions wrote it
    plain["data"]["manifest"] = "old.parquet"
    assert from_dict(plain, "config.json").data == replace(config.data, manifest=Path("old.parquet"), weights=None)
    [flag] = [flag for flag in list_flags(TrainConfig) if flag.name == "data.manifest"]
    assert describe_flag(flag) == "--data.manifest PATH ..."


def test_manifests_are_opened_with_roots_of_their_own(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 1)):
        (tmp_path / f"new-{name}").mkdir()
        for number in range(count):
            (tmp_path / f"new-{name}" / f"{number}.mp4").touch()
        write_manifest(tmp_path / f"{name}.parquet", videos(count), tmp_path / f"old-{name}")
    data = DataConfig(
        manifest=(tmp_path / "a.parquet", tmp_path / "b.parquet"), root=(tmp_path / "new-a", tmp_path / "new-b")
    )
    manifest = open_data_sets(data)
    assert [manifest.file(row) for row in (1, 2)] == [str(tmp_path / "new-a/1.mp4"), str(tmp_path / "new-b/0.mp4")]
    with pytest.raises(
        FileNotFoundError, match=r"videos in .*a\.parquet is not there: .*; say where they are now with "
    ):
        open_data_sets(replace(data, root=None))


def test_a_run_describes_its_data_sets() -> None:
    manifest = joined(30, 10)
    data = DataConfig(manifest=(A, B), weights=(1.0, 1.0))
    assert describe_videos(manifest, data) == "40 videos of 2 data sets"
    assert describe_sets(manifest, data) == [
        "set0: 30 videos from a.parquet, 50.0% of the clips, each video 0.67 times an epoch",
        "set1: 10 videos from b.parquet, 50.0% of the clips, each video 2.00 times an epoch",
    ]
    assert describe_sets(manifest, replace(data, weights=None)) == [
        "set0: 30 videos from a.parquet, 75.0% of the clips",
        "set1: 10 videos from b.parquet, 25.0% of the clips",
    ]
    one = Manifest.of(videos(3), Path("/x"))
    assert (describe_videos(one, DataConfig(manifest=A)), describe_sets(one, data)) == ("3 videos from a.parquet", [])


def test_too_many_unreadable_videos_are_those_of_one_data_set() -> None:
    """Two of ten are too many, although they are few among all; one of ten is always tolerated."""
    several = SetFigures(joined(990, 10), DataConfig(manifest=(A, B)), 0)
    assert several.find_broken({0, 1, 990}, 0.05) is None
    broken = several.find_broken({0, 990, 995}, 0.05)
    assert broken is not None
    assert (broken.name, broken.rows_of({0, 990, 995})) == ("set1", {990, 995})
    assert several.skipped({0, 990, 995}) == {"skipped_videos/set0": 1, "skipped_videos/set1": 2}
    one = SetFigures(Manifest.of(videos(10), Path("/x")), DataConfig(), 0)
    assert one.find_broken({1, 2}, 0.2) is None
    assert one.find_broken({1, 2, 3}, 0.2) is not None
    assert one.skipped({1, 2}) == {}
