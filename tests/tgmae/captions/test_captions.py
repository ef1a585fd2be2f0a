"""Every video has a caption or is named; every caption is embedded once, and the right one goes with each clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from dali_pipelines.types import ClipBatch, ClipRequest, CropBox
from engines.clip_model import CLIPModel, load_clip
from engines.config import CLIPConfig
from engines.text_cache import embed_captions
from tests.support.videos import clip_batch, make_video
from tgmae.captions.embeddings import CaptionEmbeddings
from tgmae.captions.policy import require_captions
from tgmae.data.manifest import SCHEMA, Manifest
from tgmae.masks.maps.store import digest_videos

CPU = torch.device("cpu")


def manifest_of(*captions: Sequence[str], labels: Sequence[str] | None = None) -> Manifest:
    """A manifest of videos 0.mp4, 1.mp4, … with these captions; their labels are walk, or those given."""
    names = labels or ["walk"] * len(captions)
    videos = [
        make_video(path=f"{row}.mp4", captions=tuple(texts), label=name)
        for row, (texts, name) in enumerate(zip(captions, names, strict=True))
    ]
    return Manifest.of(videos, Path("/nowhere"))


def drawn(manifest: Manifest, *places: tuple[int, int]) -> ClipBatch:
    """A batch that drew these captions: (row, number of the caption)."""
    crop = CropBox(x=0, y=0, width=1, height=1)
    requests = [
        ClipRequest(row=row, epoch=0, position=0, frames=(0,), crop=crop, flip=False, caption=number, mask_seed=0)
        for row, number in places
    ]
    return clip_batch(torch.zeros(len(places), 1, 1, 1, 3, dtype=torch.uint8), requests, manifest)


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return load_clip(CLIPConfig(model="shapes"))


class CountingClip:
    """A CLIP whose embedding of a text is known, and which remembers what it was asked."""

    def __init__(self, clip: CLIPModel, key: str = "0123456789abcdef") -> None:
        self.tokenizer, self.captions_key, self.too_long = clip.tokenizer, key, clip.too_long
        self.asked: list[list[str]] = []

    def encode_text(self, captions: Sequence[str], device: torch.device) -> Tensor:
        self.asked.append(list(captions))
        return torch.stack([self.embedding(text) for text in captions])

    @staticmethod
    def embedding(text: str) -> Tensor:
        return torch.from_numpy(np.random.default_rng(list(text.encode())).standard_normal(8).astype(np.float32))


# Which videos have a caption


def test_complete_captions_pass_unchanged() -> None:
    manifest = manifest_of(["a cat"], ["a dog", "a hound"])
    for choice in ("error", "exclude", "label"):
        got, note = require_captions(manifest, choice)  # type: ignore[arg-type]
        assert [got[row] for row in range(2)] == [manifest[row] for row in range(2)]
        assert (note, got.root) == ("", manifest.root)


def test_empty_and_blank_captions_are_dropped_and_edges_trimmed() -> None:
    got, note = require_captions(manifest_of(["", "a cat", "  "], [" a dog\n", "\t", "a hound"]), "error")
    assert [got[row].texts for row in range(2)] == [("a cat",), ("a dog", "a hound")]
    assert note == ""
    assert got.table.schema.equals(SCHEMA)


def test_videos_without_captions_are_named_with_the_three_choices() -> None:
    manifest = manifest_of(["a cat"], [], ["", " "], [], ["\n"])
    with pytest.raises(ValueError, match=r"^4 of 5 videos have no caption, such as 1\.mp4, 2\.mp4, 3\.mp4\.") as caught:
        require_captions(manifest, "error", "train without text: --mask.kind tube")
    for choice in ("--mask.no-caption exclude", "--mask.no-caption label", "--mask.kind tube"):
        assert choice in str(caught.value)


def test_class_names_become_words() -> None:
    labels = ["brush_hair", "ApplyEyeMakeup", "YoYo", "air drumming", "playing the iPhone", "TaiChi_slow", "noFight"]
    manifest, _ = require_captions(manifest_of(*[[] for _ in labels], labels=labels), "label")
    assert [texts[0].text for texts in manifest.captions()] == [
        "brush hair", "Apply Eye Makeup", "Yo Yo", "air drumming", "playing the iPhone", "TaiChi slow", "no Fight",
    ]  # fmt: skip


def test_only_what_helps_is_offered() -> None:
    """Nothing to leave out where no video has a caption, nothing to take where one has no label."""
    with pytest.raises(ValueError, match=r"^2 of 2 videos") as caught:
        require_captions(manifest_of([], []), "error")
    assert "exclude" not in str(caught.value)
    assert "--mask.no-caption label" in str(caught.value)
    assert "without text" not in str(caught.value)
    manifest = manifest_of([], ["a cat"])
    place = manifest.table.schema.get_field_index("label")
    bare = Manifest(manifest.table.set_column(place, "label", pa.array(["", "cat"])), manifest.root)
    with pytest.raises(ValueError, match=r"^1 of 2 videos") as caught:
        require_captions(bare, "error")
    assert "--mask.no-caption label" not in str(caught.value)
    assert "exclude" in str(caught.value)


def test_exclude_leaves_the_others_in_order() -> None:
    got, note = require_captions(manifest_of([], ["a"], [""], ["b", " "], ["c"]), "exclude")
    assert [(got[row].path, got[row].texts) for row in range(len(got))] == [
        ("1.mp4", ("a",)),
        ("3.mp4", ("b",)),
        ("4.mp4", ("c",)),
    ]
    assert note == "2 videos without a caption are left out"


def test_exclude_with_nothing_left() -> None:
    with pytest.raises(ValueError, match=r"none of the 2 videos has a caption; .*--mask\.kind tube"):
        require_captions(manifest_of([], [" "]), "exclude", "train without text: --mask.kind tube")
    with pytest.raises(ValueError, match=r"^none of the 2 videos has a caption$"):
        require_captions(manifest_of([], [" "]), "exclude")


def test_labels_stand_in_with_spaces_for_underscores() -> None:
    manifest = manifest_of(["a cat"], [], [" "], labels=["x", "playing_the__flute", "Run"])
    got, note = require_captions(manifest, "label")
    assert [got[row].texts for row in range(3)] == [("a cat",), ("playing the flute",), ("Run",)]
    assert [got[row].label for row in range(3)] == ["x", "playing_the__flute", "Run"]
    assert note == "2 videos without a caption use their label"


def test_neither_caption_nor_label() -> None:
    manifest = manifest_of(["a cat"], [], [], labels=["", "_", "run"])
    with pytest.raises(ValueError, match=r"^1 video has neither .* such as 1\.mp4; .*--mask\.no-caption exclude"):
        require_captions(manifest, "label")


# Embeddings


def test_each_request_gets_the_embedding_of_its_own_caption(clip: CLIPModel, tmp_path: Path) -> None:
    """Captions that videos share, one twice in the same video, in an order of its own."""
    captions = [["b", "a"], ["c"], ["a", "d", "a"], ["b"]]
    fake = CountingClip(clip)
    table = CaptionEmbeddings(manifest_of(*captions), fake, tmp_path, CPU)  # type: ignore[arg-type]
    assert fake.asked == [["a", "b", "c", "d"]]  # each distinct caption once
    assert (table.table.shape, table.table.dtype) == ((4, 8), torch.float32)
    places = [(2, 1), (0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (2, 2)]
    got = table(drawn(manifest_of(*captions), *places))
    expected = torch.stack([fake.embedding(captions[row][caption]) for row, caption in places])
    assert torch.equal(got, expected)
    for texts in captions:
        assert torch.equal(table.of(texts), torch.stack([fake.embedding(text) for text in texts]))


def test_embeddings_are_open_clips_own(clip: CLIPModel, tmp_path: Path) -> None:
    """Tokenised and encoded one by one by open_clip, then normalised in float64."""
    captions = ["a red circle moving left", "a blue star", "an orange cross spinning"]
    table = CaptionEmbeddings(manifest_of(captions), clip, tmp_path, CPU)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")  # CLIP's own vocabulary, which the tiny one shares
    for number, text in enumerate(captions):
        with torch.inference_mode():
            raw = clip.model.encode_text(tokenizer([text]))[0].double()  # type: ignore[operator]
        expected = (raw / raw.square().sum().sqrt()).float()
        torch.testing.assert_close(table(drawn(manifest_of(captions), (0, number)))[0], expected, rtol=0, atol=1e-5)


def test_embeddings_are_read_from_disk_the_second_time(clip: CLIPModel, tmp_path: Path) -> None:
    """Bit for bit the same; a new caption costs that caption alone; the order asked for does not matter."""
    folder = tmp_path / "new" / "cache"
    fake = CountingClip(clip)
    first = embed_captions(fake, ["b", "a"], folder, CPU)[0]  # type: ignore[arg-type]
    again = embed_captions(fake, ["a", "b"], folder, CPU)[0]  # type: ignore[arg-type]
    assert fake.asked == [["b", "a"]]
    assert torch.equal(again, first[[1, 0]])
    more = embed_captions(fake, ["c", "a", "b"], folder, CPU)[0]  # type: ignore[arg-type]
    assert fake.asked == [["b", "a"], ["c"]]
    assert torch.equal(more, torch.stack([fake.embedding(text) for text in "cab"]))
    assert torch.equal(embed_captions(fake, ["b", "c"], folder, CPU)[0], more[[2, 0]])  # type: ignore[arg-type]
    assert len(fake.asked) == 2
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".parquet"]


def test_another_clip_has_a_file_of_its_own(clip: CLIPModel, tmp_path: Path) -> None:
    one, other = CountingClip(clip, "a" * 16), CountingClip(clip, "b" * 16)
    embed_captions(one, ["x"], tmp_path, CPU)  # type: ignore[arg-type]
    embed_captions(other, ["x"], tmp_path, CPU)  # type: ignore[arg-type]
    assert other.asked == [["x"]]
    assert len(list(tmp_path.glob("*.parquet"))) == 2


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "columns"])
def test_a_broken_cache_is_made_anew(clip: CLIPModel, tmp_path: Path, damage: str) -> None:
    fake = CountingClip(clip)
    expected = embed_captions(fake, ["x", "y"], tmp_path, CPU)[0]  # type: ignore[arg-type]
    [file] = tmp_path.glob("*.parquet")
    match damage:
        case "empty":
            file.write_bytes(b"")
        case "garbage":
            file.write_bytes(b"not a table" * 100)
        case "cut":
            file.write_bytes(file.read_bytes()[:-20])
        case "columns":
            pq.write_table(pa.table({"text": ["x"]}), file)
    assert torch.equal(embed_captions(fake, ["x", "y"], tmp_path, CPU)[0], expected)  # type: ignore[arg-type]
    assert fake.asked == [["x", "y"], ["x", "y"]]
    embed_captions(fake, ["x", "y"], tmp_path, CPU)  # type: ignore[arg-type]
    assert len(fake.asked) == 2  # mended


# Captions beyond CLIP's context


def test_captions_too_long_are_counted(clip: CLIPModel, tmp_path: Path) -> None:
    """77 tokens with start and end: 75 words of one token fit, 76 do not. The rest does not count."""
    fits, longer, longest = (" ".join(["cat"] * count) for count in (75, 76, 200))
    manifest = manifest_of([fits, longer], [longest, longer, "a dog"])
    table = CaptionEmbeddings(manifest, clip, tmp_path, CPU)
    assert table.note.startswith("2 of 4 captions are longer than CLIP's 77 tokens")
    assert torch.equal(table(drawn(manifest, (0, 1))), table(drawn(manifest, (1, 1))))
    assert CaptionEmbeddings(manifest_of([fits, "a dog"]), clip, tmp_path, CPU).note == ""


def test_digest_tells_captions_and_their_order_apart() -> None:
    cases = (["a", "b"], ["b", "a"], ["a"], ["ab"], ["a", "b", ""], ["a b"], ["a\nb"])
    digests = digest_videos(manifest_of(*cases), "captions")
    assert len(set(digests)) == len(cases)
    assert digest_videos(manifest_of(cases[1], cases[0]), "captions") == [digests[1], digests[0]]
