"""Captions of many sources in one manifest: adding them, and which of them clips draw."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dali_pipelines.types import Caption, Video
from tests.support.videos import make_video
from tgmae.captions.adding import add_captions, check_out
from tgmae.captions.human import read_human
from tgmae.captions.llm import TEMPLATES, read_templates
from tgmae.captions.oracle import caption_by_label, read_label
from tgmae.captions.policy import require_captions
from tgmae.captions.summary import summarise
from tgmae.config.captions import CaptionsConfig, spread
from tgmae.config.data import DataConfig
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.data.sampling import ClipSampler

BLIP = tuple(Caption(f"frame {number}", "blip2") for number in range(3))
LLM = tuple(Caption(f"class {number}", "llm") for number in range(2))


def make_manifest(*captions: tuple[Caption, ...], **changes: Any) -> Manifest:
    videos = [make_video(path=f"{row}.mp4", captions=texts, **changes) for row, texts in enumerate(captions)]
    return Manifest.of(videos, Path("/nowhere"))


def write(path: Path, *videos: Video) -> Manifest:
    write_manifest(path, videos, path.parent)
    return read_manifest(path)


# Choosing


@pytest.mark.parametrize(
    ("sources", "per_video", "expected"),
    [
        ((), "all", [0, 1, 2, 3, 4]),
        (("blip2",), "all", [0, 1, 2]),
        (("blip2",), "1", [1]),  # the centre of three keyframes
        (("blip2",), "2", [0, 2]),
        (("blip2", "llm"), "3", [0, 1, 2, 3, 4]),
        (("blip2,llm",), "1", [1, 4]),
        (("human",), "1", [0, 1, 2, 3, 4]),
    ],
)
def test_which_captions_are_kept(sources: tuple[str, ...], per_video: str, expected: list[int]) -> None:
    assert CaptionsConfig(sources=sources, per_video=per_video).choose([*BLIP, *LLM]) == expected


@pytest.mark.parametrize("per_video", ["0", "-1", "some", "1.5", ""])
def test_numbers_that_cannot_be(per_video: str) -> None:
    with pytest.raises(ValueError, match=r"^--captions\.per-video must be a number from 1 on, or all"):
        CaptionsConfig(per_video=per_video)


def test_spread_takes_middles() -> None:
    assert [spread(9, 1), spread(9, 3), spread(2, 3), spread(4, 4)] == [[4], [1, 4, 7], [0, 1], [0, 1, 2, 3]]


def draw(manifest: Manifest, captions: CaptionsConfig, data: DataConfig | None = None) -> Counter[int]:
    sampler = ClipSampler(
        manifest, data or DataConfig(stride=1), num_frames=8, batch_size=200, seed=1, captions=captions
    )
    return Counter(request.caption for request in sampler(0))


def test_clips_draw_from_what_is_kept() -> None:
    """The number in the request is that of the caption among all, so that score maps of all fit every choice."""
    manifest = make_manifest(*[(*BLIP, *LLM)] * 5)
    assert draw(manifest, CaptionsConfig()).keys() == {0, 1, 2, 3, 4}
    assert draw(manifest, CaptionsConfig(sources=("llm",))).keys() == {3, 4}
    assert draw(manifest, CaptionsConfig(per_video="1")).keys() == {1, 4}
    assert draw(manifest, CaptionsConfig(sources=("llm",)), DataConfig(stride=1, captions="first")).keys() == {3}
    assert draw(make_manifest(()), CaptionsConfig(sources=("llm",))).keys() == {0}


def test_a_choice_changes_captions_and_nothing_else() -> None:
    manifest = make_manifest(*[(*BLIP, *LLM)] * 5)
    samplers = [
        ClipSampler(manifest, DataConfig(stride=1), num_frames=8, batch_size=50, seed=1, captions=captions)
        for captions in (CaptionsConfig(), CaptionsConfig(sources=("blip2",)))
    ]
    plain, chosen = ([replace(request, caption=0) for request in sampler(0)] for sampler in samplers)
    assert [(request.row, request.frames, request.crop) for request in plain] == [
        (request.row, request.frames, request.crop) for request in chosen
    ]


def test_videos_without_a_caption_of_the_source() -> None:
    manifest = make_manifest((*BLIP, *LLM), BLIP, labels := LLM)
    assert labels
    chosen = CaptionsConfig(sources=("llm",))
    with pytest.raises(ValueError, match=r"^1 of 3 videos has no caption of the source llm, such as 1\.mp4\."):
        require_captions(manifest, "error", chosen=chosen)
    kept, note = require_captions(manifest, "exclude", chosen=chosen)
    assert kept.names() == ["0.mp4", "2.mp4"]
    assert kept[0].captions == (*BLIP, *LLM)  # the others stay: maps know them by number
    assert note == "1 video without a caption is left out"
    labelled, _ = require_captions(manifest, "label", chosen=chosen)
    assert labelled[1].captions == (Caption("walk", "label"),)
    assert chosen.choose(labelled[1].captions) == [0]


def test_a_source_that_nothing_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no caption has the source 'blip'.* have captions of blip2 \(3\), llm \(2\)"):
        require_captions(make_manifest((*BLIP, *LLM)), "exclude", chosen=CaptionsConfig(sources=("blip",)))


# Adding


def test_captions_of_a_source_replace_those_of_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    manifest = write(path, make_video(path="0.mp4", captions=(*BLIP, *LLM)), make_video(path="1.mp4", captions=BLIP))
    new = [Caption("new", "blip2")]
    added = add_captions(path, None, manifest, [new, None], "blip2")
    assert [read_manifest(path)[row].captions for row in range(2)] == [(*LLM, *new), BLIP]
    assert added.describe(path, "blip2") == (f"{path}: 4 captions of source blip2 for 2 videos, in place of 3")
    add_captions(path, None, manifest, [[], []], "llm")
    assert read_manifest(path)[0].captions == tuple(new)


def test_other_rows_and_what_was_added_meanwhile_stay(tmp_path: Path) -> None:
    """Hours may pass between reading a manifest and adding to it."""
    path = tmp_path / "m.parquet"
    manifest = write(path, *(make_video(path=f"{row}.mp4", captions=BLIP, split=split) for row, split in
                             enumerate(("train", "val"))))  # fmt: skip
    train = manifest.select_split("train")
    add_captions(path, None, manifest, [LLM, LLM], "llm")
    add_captions(path, None, train, [[Caption("a hand", "human")]], "human")
    found = read_manifest(path)
    assert found[0].captions == (*BLIP, *LLM, Caption("a hand", "human"))
    assert found[1].captions == (*BLIP, *LLM)
    assert found.root == manifest.root


def test_another_manifest_is_not_overwritten_with_less(tmp_path: Path) -> None:
    path, out = tmp_path / "m.parquet", tmp_path / "out" / "o.parquet"
    manifest = write(path, make_video(path="0.mp4", captions=()))
    check_out(path, out)
    add_captions(path, out, manifest, [BLIP], "blip2")
    assert read_manifest(out)[0].captions == BLIP
    assert read_manifest(out).root == tmp_path
    assert read_manifest(path)[0].captions == ()
    with pytest.raises(ValueError, match=rf"{out} holds captions of blip2, which {path} has not"):
        check_out(path, out)
    check_out(path, path)


# Labels


def test_labels_read_as_words() -> None:
    names = ["brush_hair", "ApplyEyeMakeup", "Putting something on a surface", "YoYo", " fall  down ", "", "noFight"]
    words = ["brush hair", "Apply Eye Makeup", "Putting something on a surface", "Yo Yo", "fall down", "", "no Fight"]
    assert [read_label(name) for name in names] == words


def test_oracle_captions(tmp_path: Path) -> None:
    found = caption_by_label(make_manifest((), (), label="brush_hair"))
    assert found == [[Caption("brush hair", "oracle")]] * 2
    with pytest.raises(ValueError, match="none of 1 video has a label"):
        caption_by_label(make_manifest((), label=""))


def test_the_templates_are_the_papers(tmp_path: Path) -> None:
    """Table 6a."""
    assert read_templates(None) == TEMPLATES
    assert [template.format("dance") for template in TEMPLATES] == [
        "Describe the action dance.", "What does a person dance look like?", "What does the act of dance look like?",
    ]  # fmt: skip
    own = tmp_path / "own.txt"
    own.write_text("\ufeffHow does one {}?\n\n", encoding="utf-8")
    assert read_templates(own) == ("How does one {}?",)
    own.write_text("How?\n")
    with pytest.raises(ValueError, match=r"own\.txt must hold a question on each line, .*; got 'How\?'"):
        read_templates(own)


# People


PATHS = ["a/78687.webm", "a/2.webm", "b/2.webm", "späte/ü.mp4"]


@pytest.fixture
def videos() -> Manifest:
    rows = [make_video(path=path, captions=()) for path in PATHS]
    return Manifest.of([*rows, *(make_video(path="long.mp4", segment=span, captions=()) for span in ((0, 9), (9, 20)))],
                       Path("/nowhere"))  # fmt: skip


def read(file: Path, text: str, manifest: Manifest, encoding: str = "utf-8", **options: Any) -> list[list[str] | None]:
    file.write_text(text, encoding=encoding)
    options = {"path_column": "path", "caption_column": None, **options}
    matched = read_human(file, manifest, "human", **options)
    assert all(caption.source == "human" for row in matched.captions for caption in row or ())
    return [None if row is None else [caption.text for caption in row] for row in matched.captions]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables_with_every_separator(separator: str, encoding: str, videos: Manifest, tmp_path: Path) -> None:
    rows = [
        ["Path", "caption", "caption_2", "note"], ["a/78687.webm", '"a hand, ""two""; cups"', "eine Tür", "x"],
        ["spa\u0308te/u\u0308.mp4", "Tee", "", ""], ["a/78687", "later", "", ""], ["gone.mp4", "nothing", "", ""],
    ]  # fmt: skip
    found = read(tmp_path / "c.csv", "\n".join(separator.join(row) for row in rows), videos, encoding)
    assert found == [['a hand, "two"; cups', "eine Tür", "later"], None, None, ["Tee"], None, None]


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("c.json", json.dumps({"78687": "a", "a/2.webm": ["b", "c"], "long.mp4": "d", "long.mp4#9-20": "e"}), {}),
        (
            "c.json",
            json.dumps([
                {"id": "78687", "label": "a", "template": "x"}, {"id": "a/2", "label": ["b", "c"]},
                {"id": "long", "label": "d"}, {"id": "long.mp4#9-20", "label": "e"},
            ]),
            {"path_column": "id", "caption_column": "label"},
        ),
        (
            "c.jsonl",
            '\ufeff{"path": "78687", "caption": "a"}\n\n{"path": "a/2.webm", "captions": ["b", "c"]}\n'
            '{"path": "long.mp4", "caption": "d"}\n{"path": "long.mp4#9-20", "caption": "e"}\n',
            {},
        ),
    ],
)  # fmt: skip
def test_json_in_three_forms(name: str, text: str, options: dict[str, Any], videos: Manifest, tmp_path: Path) -> None:
    """SSv2's lists among them. A file's captions are all its segments'; a name that two files have is neither's."""
    assert read(tmp_path / name, text, videos, **options) == [["a"], ["b", "c"], None, None, ["d"], ["d", "e"]]


def test_names_below_a_folder_and_ambiguous_ones(videos: Manifest, tmp_path: Path) -> None:
    text = "File Name,Description\n2.webm,right\n"
    options = {"path_column": "file name", "caption_column": "description"}
    assert read(tmp_path / "c.csv", text, videos, under="b/", **options)[2] == ["right"]
    with pytest.raises(ValueError, match=r"has captions for none of the videos: it names '2\.webm', .* --under"):
        read(tmp_path / "c.csv", text, videos, **options)


def test_names_that_fit_nothing_are_counted(videos: Manifest, tmp_path: Path) -> None:
    file = tmp_path / "c.csv"
    file.write_text("path,caption\nx.mp4,one\n78687,two\ny.mp4,three\n")
    matched = read_human(file, videos, "human", "path", None)
    assert matched.describe_unknown(file) == f"{file}: 2 of 3 entries name no video, such as 'x.mp4' in line 2"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "video,caption\na,b\n", r"c\.csv has no column 'path'; its first line names 'video', 'caption'"),
        ("c.csv", "path,text\na,b\n", r"c\.csv has no column 'caption'; its first line .* --caption-column"),
        ("c.csv", "", r"c\.csv has no column 'path'; its first line names nothing"),
        ("c.csv", 'path,caption\na,"b\n', r"c\.csv line 2: a text in quotes that begins here is not closed"),
        ("c.json", "{", r"c\.json is not JSON"),
        ("c.json", "3", r"c\.json must hold a list of objects"),
        ("c.json", '[{"id": 1}]', r"c\.json entry 0 has no field 'path', got .*--path-column"),
        ("c.json", '[{"path": "a", "caption": 3}]', r"c\.json entry 0 must have texts in 'caption or captions'"),
    ],
)
def test_files_that_cannot_be_read(name: str, text: str, message: str, videos: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, text, videos)
    (tmp_path / name).write_bytes(b"path,caption\n78687,T\xfcr\n")
    with pytest.raises(ValueError, match=r"is not UTF-8 .*; save it as UTF-8"):
        read_human(tmp_path / name, videos, "human", "path", None)
    with pytest.raises(FileNotFoundError, match=r"no file .*gone"):
        read_human(tmp_path / "gone", videos, "human", "path", None)


# Summary


@pytest.mark.slow
def test_summary_counts_what_matters() -> None:
    long = Caption(" ".join(["tree"] * 10 + [f"w{number}" for number in range(80)]), "llm")
    manifest = make_manifest((*BLIP, long), (*BLIP, Caption("a a a a a", "llm")), ())
    blip, llm = summarise(manifest)
    assert (blip.source, blip.num_captions, blip.num_videos, blip.num_repeated) == ("blip2", 6, 2, 6)
    assert (blip.words, blip.num_too_long, blip.num_flagged) == ((2, 2, 2), 0, 0)
    assert (llm.source, llm.num_captions, llm.num_repeated, llm.num_too_long) == ("llm", 2, 0, 1)
    assert llm.num_flagged == 2
