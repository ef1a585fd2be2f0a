"""CSVs as people have them: every row and caption is taken, or the line that is in the way is named."""

from __future__ import annotations

import csv
import unicodedata
from pathlib import Path

import pytest

from dali_pipelines.types import Caption
from tests.support.videos import write_numbered
from tgmae.data.csv_list import list_csv
from tgmae.data.indexing import index_folder
from tgmae.data.listing import Listing
from tgmae.data.manifest import read_manifest

HEADER = "path,label,caption\n"


def read(tmp_path: Path, text: str) -> Listing:
    (tmp_path / "list.csv").write_bytes(text.encode())
    return list_csv(tmp_path / "list.csv", tmp_path, "train")


def texts(listing: Listing) -> dict[str, tuple[str, ...]]:
    return {entry.path: tuple(caption.text for caption in entry.captions) for entry in listing.entries}


@pytest.mark.parametrize(
    ("rows", "line", "words"),
    [
        ('1.mp4,a,one\n2.mp4,a,"he said hello\n3.mp4,a,three\n4.mp4,a,x "y"\n', 3, "on line 5"),  # a quote inside
        ('1.mp4,a,one\n2.mp4,a,"24 inch pipe\n3.mp4,a,three\n', 3, "is not closed"),
        # The quote is closed by one that belongs to a later row.
        ('1.mp4,a,"one\n2.mp4,a,a 24"\n3.mp4,a,three\n', 2, r"takes in the row of 2\.mp4"),
        ('1.mp4,a,"one, two\n2.mp4,a,"three"\n', 2, "is followed by something other than a comma"),
        (
            '1.mp4,a,"one"\n2.mp4,a,"two" (sic)\n',
            3,
            "is followed by something other than a comma where it closes, on line 3",
        ),
    ],
)
def test_a_quote_takes_no_rows(tmp_path: Path, rows: str, line: int, words: str) -> None:
    with pytest.raises(ValueError, match=rf"list\.csv line {line}: a text in quotes that begins here .*{words}"):
        read(tmp_path, HEADER + rows)


@pytest.mark.parametrize(
    ("rows", "doubtful"),
    [
        ('u7Gx,a,"he said\nq2Lk,a,two\nz9Ab,b,"\nw1,a,x\n', [2]),  # the quote is closed by one that was never opened
        ('"u7Gx\nq2Lk",a,one\nw1,a,"one\nq2,a,three"\n', [2, 4]),
        ('u7Gx,a,"first line\nsecond line, with commas, and more\nlast"\nw1,a,x\n', []),
        ('u7Gx,a,"first line\nsecond, and last"\nw1,a,x\n', []),
    ],
)
def test_a_text_that_may_hold_rows_is_said(tmp_path: Path, rows: str, doubtful: list[int]) -> None:
    """Names without a suffix, of files that are not there: nothing tells for certain."""
    assert read(tmp_path, HEADER + rows).doubtful == doubtful


@pytest.mark.parametrize(
    "text",
    [
        'label,caption,path\na,"one, two,1.mp4\nb,a 24",2.mp4\n',
        'path,caption\nclips/1,"one\nclips/2,a 24"\nclips/3,x\n',
    ],
)
def test_a_quote_takes_no_rows_wherever_the_path_stands(tmp_path: Path, text: str) -> None:
    """In the last column, and without a suffix where the files are there."""
    (tmp_path / "clips").mkdir()
    for name in "123":
        (tmp_path / "clips" / name).touch()
    with pytest.raises(ValueError, match=r"line 2: a text in quotes that begins here takes in the row of "):
        read(tmp_path, text)


def test_captions_of_several_lines_are_whole(tmp_path: Path) -> None:
    listing = read(tmp_path, HEADER + '1.mp4,a,"line one\nas in b.mp4, with a comma\nand ""quotes"""\r\n2.mp4,a,x\r\n')
    assert texts(listing) == {
        "1.mp4": ('line one\nas in b.mp4, with a comma\nand "quotes"',),
        "2.mp4": ("x",),
    }


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_only_line_ends_end_a_line(tmp_path: Path, separator: str) -> None:
    listing = read(tmp_path, HEADER + f'1.mp4,a,one{separator}two\n2.mp4,a,"three{separator}four, five"\n')
    assert texts(listing) == {"1.mp4": (f"one{separator}two",), "2.mp4": (f"three{separator}four, five",)}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems(tmp_path: Path, end: str) -> None:
    assert texts(read(tmp_path, end.join(["path,caption", "1.mp4,one", "2.mp4,two", ""]))) == {
        "1.mp4": ("one",),
        "2.mp4": ("two",),
    }


def test_a_text_of_any_length(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "very long text " * 20_000
    assert texts(read(tmp_path, HEADER + f'1.mp4,a,"{long}"\n'))["1.mp4"] == (long.strip(),)
    assert csv.field_size_limit() == limit


def test_a_nul_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"list\.csv line 2 holds a NUL character"):
        read(tmp_path, HEADER + "1.mp4,a,o\0ne\n")


def test_columns_that_are_captions(tmp_path: Path) -> None:
    """`caption` or `captions`, alone or with a number. The others are named, not read."""
    header = "path,Caption,captions,caption1,caption_2,caption 3,caption-4,caption_id,caption_lang,captioner,text,"
    listing = read(tmp_path, header + "\n1.mp4,a,b,c,d,e,f,17,en,me,a text,x\n")
    assert texts(listing) == {"1.mp4": ("a", "b", "c", "d", "e", "f")}
    assert listing.ignored == ["caption_id", "caption_lang", "captioner", "text", "(unnamed)"]


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    assert texts(read(tmp_path, "path,caption,caption\n1.mp4,one,two\n")) == {"1.mp4": ("one", "two")}
    for name in ("path", "label", "split"):
        with pytest.raises(ValueError, match=rf"list\.csv has 2 columns named '{name}'; keep one"):
            read(tmp_path, f"path,label,split,{name}\n1.mp4,a,train,x\n")


@pytest.mark.parametrize("cell", ["\"['a dog', 'a hound']\"", '"[""a dog""]"', "[]", "\"['a'\n 'b']\""])
def test_a_list_is_not_a_caption(tmp_path: Path, cell: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)line 2: the caption is a list, \[.*give each caption a column"):
        read(tmp_path, f"path,captions\n1.mp4,{cell}\n")
    assert texts(read(tmp_path, "path,caption\n1.mp4,[music] plays\n")) == {"1.mp4": ("[music] plays",)}


@pytest.mark.parametrize(("on_disk", "in_csv"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_are_composed_in_two_ways(tmp_path: Path, on_disk: str, in_csv: str) -> None:
    """macOS stores é as e and an accent. Folders too; rows of both forms are one video."""
    path = "한국/é 1.mp4"
    real = unicodedata.normalize(on_disk, path)  # type: ignore[arg-type]
    (tmp_path / real).parent.mkdir()
    (tmp_path / real).touch()
    listing = read(tmp_path, f"path,caption\n{unicodedata.normalize(in_csv, path)},one\n{real},two\n")  # type: ignore[arg-type]
    assert texts(listing) == {real: ("one", "two")}


def test_each_of_two_files_of_one_normal_form_is_itself(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "é.mp4") for form in ("NFC", "NFD")]  # type: ignore[arg-type]
    for name in names:
        (tmp_path / name).touch()
    listing = read(tmp_path, f"path,caption\n{names[0]},one\n{names[1]},two\n")
    assert texts(listing) == {names[0]: ("one",), names[1]: ("two",)}


def test_spaces_around_a_name(tmp_path: Path) -> None:
    (tmp_path / " a b .mp4 ").touch()
    assert texts(read(tmp_path, "path,caption\n a b .mp4 ,one\n")) == {" a b .mp4 ": ("one",)}


def test_what_the_csv_gave_is_said(tmp_path: Path) -> None:
    for name in ("1.mp4", "2.mp4"):
        write_numbered(tmp_path / name, num_frames=16)
    out, table = tmp_path / "m.parquet", tmp_path / "list.csv"
    table.write_text("path,label,split,text\n1.mp4,run,Train,a man\n2.mp4,run,train,\n3.mp4,run,train,\n")
    result = index_folder(tmp_path, out, csv_path=table, num_workers=1)
    assert result.table == (
        f"{table} gave 1 label and 0 captions (2 videos without any); splits Train 1, train 1; ignored columns: text"
    )
    assert f"2 videos (0 unchanged), 1 left out (1 of them not there; {out}.excluded.csv says why)" in result.describe(
        out, 0.0
    )
    table.write_text("path,caption,caption\n1.mp4,a,b\n2.mp4,c,\n")
    result = index_folder(tmp_path, out, csv_path=table, num_workers=1)
    assert result.table == f"{table} gave 0 labels and 3 captions; splits train 2"


# What the manifest knew before


def test_an_index_without_its_csv_loses_nothing(tmp_path: Path) -> None:
    for path in ("walk/1.mp4", "walk/2.mp4"):
        write_numbered(tmp_path / path, num_frames=16)
    out, table = tmp_path / "manifest.parquet", tmp_path / "list.csv"
    for columns, lost in (
        ("path,label,caption\nwalk/1.mp4,walk,one\nwalk/2.mp4,walk,two\n", "2 captions"),
        ("path,caption\nwalk/1.mp4,one\nwalk/2.mp4,two\n", "holds 2 captions"),
        ("path,label\nwalk/1.mp4,run\nwalk/2.mp4,walk\n", "1 label other than the names of folders"),
        ("path,label,split\nwalk/1.mp4,walk,train\nwalk/2.mp4,walk,val\n", "the splits train, val"),
        ("path,label,split\nwalk/1.mp4,walk,val\nwalk/2.mp4,walk,val\n", "the split val"),
    ):
        table.write_text(columns)
        index_folder(tmp_path, out, csv_path=table, num_workers=1)
        before = out.read_bytes()
        message = f"{lost}, which an index without a CSV would drop; give the CSV again with --csv"
        for decode_all in (False, True):
            with pytest.raises(ValueError, match=message):
                index_folder(tmp_path, out, decode_all=decode_all, num_workers=1)
        assert out.read_bytes() == before
        assert index_folder(tmp_path, out, csv_path=table, num_workers=1).num_reused == 2
    out.unlink()
    index_folder(tmp_path, out, num_workers=1)
    assert index_folder(tmp_path, out, num_workers=1).num_reused == 2  # a folder gives its own labels again
    assert index_folder(tmp_path, out, split="val", num_workers=1).num_reused == 2
    assert index_folder(tmp_path, out, split="val", num_workers=1).num_reused == 2
    assert [video.label for video in (read_manifest(out)[0], read_manifest(out)[1])] == ["walk", "walk"]


def test_captions_have_the_source_of_the_csv(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,caption\n1.mp4,one\n")
    [entry] = list_csv(tmp_path / "list.csv", tmp_path, "train", "shapes").entries
    assert entry.captions == (Caption("one", "shapes"),)
