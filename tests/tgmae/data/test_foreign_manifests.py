"""Manifests that other programs wrote: what means the same is read, all else is refused with row and file."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dali_pipelines.types import Video
from tests.support.videos import make_video
from tgmae.data.manifest import ROOT_KEY, Manifest, read_manifest, write_manifest

VIDEOS = [
    make_video(path="a.mp4", stream=1, mirrored=True),
    make_video(path="b.mp4", segment=(3, 20), captions=()),
    make_video(path="c.mp4", fps=0.0, captions=("one",), split="val"),
]


def rewrite(path: Path, /, metadata: dict[bytes, bytes] | None = None, **columns: Any) -> Path:
    """Write the manifest of VIDEOS as other programs do: without our metadata, and with other columns."""
    table = Manifest.of(VIDEOS, path.parent).table
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        column = values if isinstance(values, pa.Array) else pa.array(values)
        table = table.set_column(place, name, column)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def rows(manifest: Manifest) -> list[Video]:
    return [manifest[row] for row in range(len(manifest))]


def column(path: Path, name: str) -> pa.ChunkedArray:
    return Manifest.of(VIDEOS, path.parent).table.column(name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("path", pa.large_string()),  # polars, pandas 3
        ("path", pa.string_view()),
        ("label", pa.dictionary(pa.int32(), pa.string())),  # categories
        ("split", pa.dictionary(pa.int8(), pa.large_string())),
        ("captions", pa.large_list(pa.large_string())),
        ("caption_sources", pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        ("keyframes", pa.large_list(pa.int64())),
        ("keyframe_pts", pa.list_(pa.int32())),
        ("width", pa.float64()),  # pandas, after a merge
        ("num_frames", pa.uint16()),
        ("num_bytes", pa.int32()),
        ("height", pa.decimal128(10, 0)),
        ("fps", pa.float32()),
    ],
)
def test_other_widths_mean_the_same(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    path = tmp_path / "manifest.parquet"
    values = column(path, name)
    cast = pa.array([Decimal(value) for value in values.to_pylist()], kind) if pa.types.is_decimal(kind) else None
    if cast is None:
        cast = pa.array(values.to_pylist(), kind)
    assert rows(read_manifest(rewrite(path, **{name: cast}))) == VIDEOS


def test_a_table_without_our_metadata_keeps_all_it_says(tmp_path: Path) -> None:
    """Pandas drops metadata: segments, streams and mirroring stay, and paths are relative to the file's folder."""
    manifest = read_manifest(rewrite(tmp_path / "manifest.parquet"))
    assert rows(manifest) == VIDEOS
    assert manifest.root == tmp_path.resolve()
    path = rewrite(tmp_path / "manifest.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["stream", "mirrored", "digest"]), path)  # then it is of format 2
    assert read_manifest(path)[1].segment == (3, 20)
    assert read_manifest(path).format == 2


@pytest.mark.parametrize("name", ["start_frame", "caption_sources", "stream", "mirrored"])
def test_no_column_is_given_up_for_want_of_another(tmp_path: Path, name: str) -> None:
    path = rewrite(tmp_path / "manifest.parquet")
    pq.write_table(pq.read_table(path).drop_columns([name]), path)
    with pytest.raises(ValueError, match=rf"columns \['{name}'\] are missing"):
        read_manifest(path)


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    path = rewrite(tmp_path / "manifest.parquet")
    table = pq.read_table(path)
    pq.write_table(table.append_column("label", table.column("label")), path)
    with pytest.raises(ValueError, match=r"manifest\.parquet has the columns \['label'\] twice; make it again"):
        read_manifest(path)


def test_no_captions_at_all(tmp_path: Path) -> None:
    """Lists that are empty in every row have no type of their own."""
    empty = pa.array([[]] * 3, pa.list_(pa.null()))
    manifest = read_manifest(rewrite(tmp_path / "manifest.parquet", captions=empty, caption_sources=empty))
    assert manifest.captions() == [[]] * 3


def test_a_table_of_some_columns_is_refused_with_the_others(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"path": ["a.mp4"], "captions": [["a"]], "label": ["x"]}), path)
    with pytest.raises(ValueError, match=r"manifest\.parquet is not a tgmae manifest: columns \['num_frames', 'fps'"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("captions", ["a man"] * 3, "expected a list of texts in each row of the column captions, got string"),
        ("captions", [b"a"] * 3, "expected a list of texts .* got binary"),
        ("captions", [[1]] * 3, "expected a list of texts .* got list<"),
        ("width", ["160"] * 3, "expected a whole number of 32 bits in each row of the column width, got string"),
        ("width", [True] * 3, ".*got bool"),
        ("mirrored", [0, 1, 2], "expected true or false in each row of the column mirrored, got int64"),
        ("fps", ["25"] * 3, "expected a number in each row of the column fps, got string"),
        ("label", [1, 2, 3], "expected text in each row of the column label, got int64"),
        ("width", [160, 160, 160.5], r"row 2, c\.mp4: width is 160\.5, expected a whole number of 32 bits"),
        ("width", [160, float("nan"), float("nan")], r"row 1, b\.mp4: width is nan"),
        ("num_frames", [40, 2**40, 40], r"row 1, b\.mp4: num_frames is 1099511627776, expected a whole number of 32"),
        (
            "keyframes",
            [[0.0], [0.0, 1.5], [0.0]],
            r"row 1, b\.mp4: keyframes is \[0\.0, 1\.5\], expected a list of whole",
        ),
        ("label", ["x", None, "y"], r"row 1, b\.mp4: empty cells in the column label"),
        ("label", [None] * 3, r"row 0, a\.mp4: empty cells in the column label"),
        ("captions", [["a", "b"], [], [None]], r"row 2, c\.mp4: captions is \[None\], which has an empty place"),
        ("keyframes", [[0], [0], [0, None]], r"row 2, c\.mp4: keyframes is \[0, None\], which has an empty place"),
        ("num_frames", [40, 40, 0], r"row 2, c\.mp4: num_frames is 0, expected at least 1"),
        ("fps", [25.0, np.nan, 25.0], r"row 1, b\.mp4: fps is nan, expected a rate, or 0 where it is unknown"),
        ("fps", [25.0, 25.0, np.inf], r"row 2, c\.mp4: fps is inf"),
        ("fps", [25.0, 25.0, -1.0], r"row 2, c\.mp4: fps is -1\.0"),
        ("width", [160, 0, 160], r"row 1, b\.mp4: width is 0, expected at least 1"),
        ("height", [120, -1, 120], r"row 1, b\.mp4: height is -1, expected at least 1"),
        ("rotation", [0, 90, 45], r"row 2, c\.mp4: rotation is 45, expected 0, 90, 180 or 270"),
        ("rotation", [-90, 0, 0], r"row 0, a\.mp4: rotation is -90"),
        ("num_bytes", [1, 2, -1], r"row 2, c\.mp4: num_bytes is -1, expected at least 0"),
        ("stream", [0, -1, 0], r"row 1, b\.mp4: stream is -1, expected at least 0"),
        ("keyframes", [[0, 12, 24], [1, 12, 24], [0, 1, 2]], r"row 1, b\.mp4: keyframes \[1, 12, 24\] do not begin"),
        ("keyframes", [[0, 24, 12], [0, 1, 2], [0, 1, 2]], r"row 0, a\.mp4: keyframes \[0, 24, 12\] do not begin"),
        ("keyframes", [[0, 12, 24], [0, 12, 12], [0, 1, 2]], r"row 1, b\.mp4: keyframes \[0, 12, 12\]"),
        ("keyframes", [[0, 1, 2], [0, 1, 2], [0, 1, 40]], r"row 2, c\.mp4: keyframes \[0, 1, 40\] .* within 40 frames"),
        ("keyframes", [[0, 1, 2], [], [0, 1, 2]], r"row 1, b\.mp4: keyframes \[\] do not begin with 0"),
        ("keyframe_pts", [[0, 1, 2], [0], [0, 1, 2]], r"row 1, b\.mp4: keyframes .* have time stamps \[0\]"),
        ("keyframe_pts", [[0, 1, 2], [0, 2, 1], [0, 1, 2]], r"row 1, b\.mp4: time stamps \[0, 2, 1\] of keyfr"),
        ("path", ["a.mp4", "", "c.mp4"], r"row 1: the path is ''"),
        ("path", ["a.mp4", "x\0y", "c.mp4"], r"row 1: the path is 'x\\x00y'"),
        ("path", ["a.mp4", "/b.mp4", "c.mp4"], "row 1: path leaves the root: '/b.mp4'"),
    ],
)
def test_what_nothing_can_be_made_of(tmp_path: Path, name: str, values: list[Any], words: str) -> None:
    values_of = pa.array(values, from_pandas=False)
    path = rewrite(tmp_path / "manifest.parquet", **{name: values_of})
    with pytest.raises(ValueError, match=rf"manifest\.parquet: {words}.*; make it again with: tgmae-data index"):
        read_manifest(path)


def test_the_checks_see_every_chunk(tmp_path: Path) -> None:
    """Large tables come in several row groups."""
    path = tmp_path / "manifest.parquet"
    videos = [make_video(path=f"{number}.mp4") for number in range(5000)]
    table = Manifest.of(videos, tmp_path).table
    keyframes = [[0, 12, 24]] * 4321 + [[0, 12, 12]] + [[0, 12, 24]] * 678
    place = table.schema.get_field_index("keyframes")
    pq.write_table(table, path, row_group_size=512)
    assert read_manifest(path)[4321] == videos[4321]
    table = table.set_column(place, "keyframes", pa.array(keyframes, pa.list_(pa.int32())))
    pq.write_table(table, path, row_group_size=512)
    with pytest.raises(ValueError, match=r"row 4321, 4321\.mp4: keyframes \[0, 12, 12\]"):
        read_manifest(path)
    frames = [40.0] * 3000 + [40.5] * 2000
    table = table.set_column(table.schema.get_field_index("num_frames"), "num_frames", pa.array(frames))
    pq.write_table(table, path, row_group_size=512)
    with pytest.raises(ValueError, match=r"row 3000, 3000\.mp4: num_frames is 40\.5"):
        read_manifest(path)


def test_a_root_that_is_not_utf_8(tmp_path: Path) -> None:
    root = tmp_path / "\udcff"
    root.mkdir()
    for path in (tmp_path / "manifest.parquet", root / "manifest.parquet"):
        write_manifest(path, VIDEOS, root)
        assert read_manifest(path).root == root
    path = rewrite(tmp_path / "other.parquet", {ROOT_KEY: b"a\0b"})
    with pytest.raises(ValueError, match=r"other\.parquet: embedded null byte; make it again"):
        read_manifest(path)
