"""The columns of a manifest: their types and the values they may have, checked once when a manifest is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("start_frame", pa.int32()),
        ("end_frame", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("codec", pa.string()),
        ("pixel_format", pa.string()),
        ("rotation", pa.int32()),
        ("num_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("keyframes", pa.list_(pa.int32())),
        ("keyframe_pts", pa.list_(pa.int64())),
        ("label", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("caption_sources", pa.list_(pa.string())),
        ("split", pa.string()),
        ("stream", pa.int32()),
        ("mirrored", pa.bool_()),
        ("digest", pa.string()),
    ]
)
_WORDS = {
    pa.string(): "text",
    pa.bool_(): "true or false",
    pa.float64(): "a number",
    pa.int32(): "a whole number of 32 bits",
    pa.int64(): "a whole number of 64 bits",
    pa.list_(pa.string()): "a list of texts",
    pa.list_(pa.int32()): "a list of whole numbers of 32 bits",
    pa.list_(pa.int64()): "a list of whole numbers of 64 bits",
}


def cast_columns(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Return the columns `names` in the manifest's types, as other writers may have stored them in other widths.

    Raises ValueError, with the row, for empty cells, and for values that another type would change: text in place of
    numbers or lists, fractions, numbers that are too large.
    """
    columns = []
    for name in names:
        column, wanted = table.column(name), SCHEMA.field(name).type
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise ValueError(f"{_name_row(table, row)}: empty cells in the column {name}")
        if not _is_kind(column.type, wanted):
            raise ValueError(f"expected {_WORDS[wanted]} in each row of the column {name}, got {column.type}")
        columns.append(_cast(table, name, wanted))
    return pa.table(columns, schema=pa.schema([SCHEMA.field(name) for name in names]))


def check_rows(table: pa.Table) -> None:
    """Raise ValueError for values that nothing can be made of, naming the first row; all columns must be there."""
    columns = {
        name: table.column(name).to_numpy()
        for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)
        if pa.types.is_integer(kind) or pa.types.is_floating(kind)
    }
    start, end, count, fps = (columns[name] for name in ("start_frame", "end_frame", "num_frames", "fps"))
    lengths = {name: _count(table, name) for name in ("keyframes", "keyframe_pts", "captions", "caption_sources")}
    for wrong, reason in (
        (count < 1, "num_frames is {num_frames}, expected at least 1"),
        (~(np.isfinite(fps) & (fps >= 0)), "fps is {fps}, expected a rate, or 0 where it is unknown"),
        (columns["width"] < 1, "width is {width}, expected at least 1"),
        (columns["height"] < 1, "height is {height}, expected at least 1"),
        (~np.isin(columns["rotation"], (0, 90, 180, 270)), "rotation is {rotation}, expected 0, 90, 180 or 270"),
        (columns["num_bytes"] < 0, "num_bytes is {num_bytes}, expected at least 0"),
        (columns["stream"] < 0, "stream is {stream}, expected at least 0"),
        (
            (start < 0) | (end > count) | (end <= start),
            "frames {start_frame} to {end_frame} are not a segment of a file of {num_frames} frames",
        ),
        (
            _find_wrong_keyframes(table, count, lengths["keyframes"]),
            "keyframes {keyframes} do not begin with 0 and ascend within {num_frames} frames",
        ),
        (
            lengths["keyframes"] != lengths["keyframe_pts"],
            "keyframes {keyframes} have time stamps {keyframe_pts}; expected one each",
        ),
        (
            _find_descending_stamps(table, lengths["keyframe_pts"]),
            "time stamps {keyframe_pts} of keyframes do not ascend",
        ),
        (
            lengths["captions"] != lengths["caption_sources"],
            "captions {captions} have sources {caption_sources}; expected one source each",
        ),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            values = {name: table.column(name)[row].as_py() for name in SCHEMA.names}
            raise ValueError(f"{_name_row(table, row)}: " + reason.format(**values))
    for row, path in enumerate(table.column("path").to_pylist()):
        if not path or "\0" in path:
            raise ValueError(f"row {row}: the path is {path!r}")
        try:
            check_relative(path)
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error
    check_names(name_rows(table))


def has_column(table: pa.Table, name: str) -> bool:
    """Return whether a table has a column of this name whose type may be the manifest's."""
    return name in table.column_names and _is_kind(table.column(name).type, SCHEMA.field(name).type)


def check_relative(path: str) -> None:
    """Raise ValueError for a path that would leave the manifest's root."""
    parts = path.replace("\\", "/").split("/")  # a quarter of the time that pathlib takes, for every row
    if (not parts[0] and len(parts) > 1) or ".." in parts:
        raise ValueError(f"path leaves the root: {path!r} (paths are relative to the root and hold no '..')")


def name_rows(table: pa.Table) -> list[str]:
    """Return `Video.name` of every row, from the columns."""
    columns = ("path", "start_frame", "end_frame", "num_frames")
    rows = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
    return [path if (start, end) == (0, count) else f"{path}#{start}-{end}" for path, start, end, count in rows]


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError where two rows have the same name: maps and compacted files are told apart by it."""
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise ValueError(
            f"expected one row per video or segment, got several for {', '.join(twice[:3])}; a row may have several "
            "captions"
        )


def _is_kind(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Return whether values of a type may mean the same in the wanted one, perhaps in another width."""
    kinds = pa.types
    if kinds.is_dictionary(found):
        found = found.value_type
    if kinds.is_list(wanted):
        is_list = kinds.is_list(found) or kinds.is_large_list(found) or kinds.is_fixed_size_list(found)
        # A list that is empty in every row has no type of its own.
        return is_list and (kinds.is_null(found.value_type) or _is_kind(found.value_type, wanted.value_type))
    if kinds.is_string(wanted):
        return bool(kinds.is_string(found) or kinds.is_large_string(found) or kinds.is_string_view(found))
    if kinds.is_boolean(wanted):
        return bool(kinds.is_boolean(found))
    return bool(kinds.is_integer(found) or kinds.is_floating(found) or kinds.is_decimal(found))


def _cast(table: pa.Table, name: str, wanted: pa.DataType) -> pa.ChunkedArray:
    column = table.column(name)
    try:
        cast = column.cast(wanted)
    except pa.ArrowNotImplementedError as error:
        raise ValueError(f"expected {_WORDS[wanted]} in each row of the column {name}, got {column.type}") from error
    except pa.ArrowInvalid as error:
        row, value = next(pair for pair in enumerate(column.to_pylist()) if not _can_cast(pair[1], column.type, wanted))
        raise ValueError(f"{_name_row(table, row)}: {name} is {value}, expected {_WORDS[wanted]}") from error
    for row, values in enumerate(cast.to_pylist()) if pa.types.is_list(wanted) and _has_gaps(cast) else ():
        if None in values:
            raise ValueError(f"{_name_row(table, row)}: {name} is {values}, which has an empty place")
    return cast


def _can_cast(value: Any, found: pa.DataType, wanted: pa.DataType) -> bool:
    try:
        pa.array([value], found).cast(wanted)
    except pa.ArrowInvalid:
        return False
    return True


def _has_gaps(lists: pa.ChunkedArray) -> bool:
    return any(chunk.flatten().null_count for chunk in lists.chunks)


def _count(table: pa.Table, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the length of every list of a column."""
    offsets = [np.diff(chunk.offsets.to_numpy()) for chunk in table.column(name).chunks]
    return np.concatenate([np.zeros(0, np.int64), *offsets])


def _find_wrong_keyframes(
    table: pa.Table, num_frames: np.ndarray[Any, np.dtype[Any]], lengths: np.ndarray[Any, np.dtype[Any]]
) -> np.ndarray[Any, np.dtype[Any]]:
    """Return, for each row, whether its keyframes do not begin with 0, ascend, and lie within the file."""
    chunks = [chunk.flatten().to_numpy() for chunk in table.column("keyframes").chunks]
    numbers = np.concatenate([np.zeros(0, np.int64), *chunks])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    is_first = np.diff(rows, prepend=-1) != 0
    is_right = np.where(is_first, numbers == 0, np.diff(numbers, prepend=0) > 0) & (numbers < num_frames[rows])
    wrong = lengths == 0
    wrong[rows[~is_right]] = True
    return np.asarray(wrong)


def _find_descending_stamps(table: pa.Table, lengths: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """Return, for each row, whether a keyframe has an earlier time stamp than the one before it."""
    chunks = [chunk.flatten().to_numpy() for chunk in table.column("keyframe_pts").chunks]
    stamps = np.concatenate([np.zeros(0, np.int64), *chunks])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    wrong = np.zeros(len(lengths), bool)
    wrong[rows[1:][(rows[1:] == rows[:-1]) & (stamps[1:] < stamps[:-1])]] = True
    return wrong


def _name_row(table: pa.Table, row: int) -> str:
    return f"row {row}, {table.column('path')[row].as_py()}"
