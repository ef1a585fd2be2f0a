"""Maps that are damaged, not finite or of another shape: refused with a name, or computed again, never used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_pipelines.types import ClipBatch, ClipRequest, CropBox
from engines.clip_model import load_clip
from engines.config import CLIPConfig, TowerSpec
from tests.support.faults.flips import TryFlips, flip_bits
from tests.support.videos import clip_batch, make_video, write_numbered
from tests.tgmae.masks.test_map_writer import COUNT, KEY, assert_whole, content, write
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.masks.cached_scorer import COMMAND, CachedScorer, score_key
from tgmae.masks.maps import records
from tgmae.masks.maps.build_scores import build_scores
from tgmae.masks.maps.records import OLD_SCHEMA, Broken
from tgmae.masks.maps.store import MapFolder, digest_videos
from tgmae.masks.maps.writer import write_maps
from tgmae.masks.motion_field import MOTION_KEY
from tgmae.masks.scorer import BoundScorer

CPU = torch.device("cpu")
CLIP = CLIPConfig(model="shapes")
FRAMES, CAPTIONS, GRID = 20, 2, (6, 8)  # of the maps of a video of 40 frames, every second, 160×120, 6 cells


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    write_manifest(tmp_path / "manifest.parquet", [make_video(path=f"{n}.mp4") for n in range(COUNT)], tmp_path)
    return read_manifest(tmp_path / "manifest.parquet")


Make = Callable[[int], NDArray[np.generic] | Broken]


def good(row: int) -> NDArray[np.float16]:
    return np.random.default_rng(row).normal(size=(FRAMES, CAPTIONS, *GRID)).astype(np.float16)


def scores(manifest: Manifest, folder: Path, make: Make = good) -> Path:
    """Write score maps that the shapes CLIP is said to have made."""

    def compute(rows: list[int]) -> Iterator[NDArray[np.generic] | Broken]:
        yield from (make(row) for row in rows)

    key = score_key("0123456789abcdef", CLIP.identity(), "patch16", 16, 6, 2)
    write_maps(manifest, digest_videos(manifest, "captions"), folder, key, COMMAND, compute)
    return folder


def scorer_of(folder: Path, manifest: Manifest) -> CachedScorer:
    mask = MaskConfig(scorer="cached", scores=folder)
    config = InputConfig(
        model=ModelConfig(image_size=96, num_frames=8), data=DataConfig(stride=4), mask=mask, clip=CLIP
    )
    return CachedScorer(config, manifest, CPU)


def clip(row: int = 0, start: int = 0) -> ClipRequest:
    crop, frames = CropBox(x=20, y=0, width=120, height=120), tuple(range(start, start + 16, 2))
    return ClipRequest(row=row, epoch=0, position=0, frames=frames, crop=crop, flip=False, caption=0, mask_seed=0)


# Flipped bits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["part-00000.arrow", "maps.json"])
@pytest.mark.parametrize("key", [KEY, {"dtype": "float16", "every": 2}], ids=["motion", "scores"])
def test_no_flipped_bit_in_maps_is_silent(
    tmp_path: Path, manifest: Manifest, name: str, key: records.Key, try_flips: TryFlips
) -> None:
    """Through everything that training reads: key, places and maps."""

    def compute(rows: list[int]) -> Iterator[NDArray[np.generic]]:
        yield from (good(row).astype(str(key["dtype"])) for row in rows)

    folder, digests = tmp_path / "maps", digest_videos(manifest)
    write_maps(manifest, digests, folder, key, "tgmae-data test", compute)

    def read() -> list[object]:
        maps = MapFolder(folder, "tgmae-data test")
        maps.check_videos(manifest, digests)
        found = [maps.read(video) for video in manifest.names()]
        return [(array.shape, array.dtype, array.tobytes()) for array in found]

    flips = try_flips(folder / name, read)
    assert flips.refused > flips.tried / 2  # the other flips lie in padding


@pytest.mark.slow
def test_a_flipped_bit_in_a_journal_costs_its_video(tmp_path: Path, manifest: Manifest) -> None:
    """What a killed run left behind is read by the next one, whose maps are those of a run that was not killed."""
    out = tmp_path / "maps"
    folder = tmp_path / "journal"
    with map_journal(folder) as journal:
        for row in range(4):
            journal.write(records.make_record(f"{row}.mp4", digest_videos(manifest)[row], content(row), KEY))
    [path] = folder.glob("*.journal")
    for _ in flip_bits(path, 40):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        shutil.copy(path, out / path.name)
        write(manifest, out)
        assert_whole(manifest, out)


def map_journal(folder: Path):  # type: ignore[no-untyped-def]  # the writer's own class
    from tgmae.masks.maps import writer

    folder.mkdir()
    return writer._Journal(folder / "part-00000.arrow", KEY)


@pytest.mark.parametrize("row", [0, 7])
def test_a_damaged_map_is_named_and_the_same_command_mends_it(
    tmp_path: Path, manifest: Manifest, row: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "maps"
    write(manifest, out)
    part = out / f"part-{row // 4:05d}.arrow"
    whole = part.read_bytes()
    compressed = pa.compress(content(row).tobytes(), codec="zstd", asbytes=True)
    place = whole.index(compressed) + len(compressed) // 2
    part.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    maps = MapFolder(out, "tgmae-data test")
    words = rf"{part.name} is damaged: the checksum of {row}\.mp4 is another one; run tgmae-data test again, which mend"
    with pytest.raises(ValueError, match=words):
        maps.read(f"{row}.mp4")
    np.testing.assert_array_equal(maps.read("3.mp4"), content(3))
    capsys.readouterr()
    assert write(manifest, out)[1] == [row]
    assert capsys.readouterr().err.count(f"the checksum of {row}.mp4 is another one; computing it again") == 1
    assert_whole(manifest, out)
    assert part.read_bytes() == whole


def test_a_flip_in_what_says_that_a_video_was_unreadable_is_found(tmp_path: Path, manifest: Manifest) -> None:
    """Random masks for a video that has motion would otherwise be the end of it."""
    write(manifest, tmp_path / "maps", broken=(1,))
    table = records.read_part(tmp_path / "maps" / "part-00000.arrow", has_checksums=True)
    row = table.slice(0, 1).to_pylist()[0] | {"shape": [], "maps": b""}
    with pa.ipc.new_file(tmp_path / "maps" / "part-00000.arrow", table.schema) as file:
        file.write_batch(pa.RecordBatch.from_pylist([row], schema=table.schema))
    with pytest.raises(ValueError, match=r"part-00000\.arrow is damaged: the checksum of 0\.mp4"):
        MapFolder(tmp_path / "maps", "tgmae-data test")


# Folders of old formats


def test_parts_without_checksums_are_read_in_old_folders_only(tmp_path: Path, manifest: Manifest) -> None:
    """And get checksums when they are written again."""
    import json

    folder = scores(manifest, tmp_path / "maps")
    [part] = folder.glob("part-*")
    table = records.read_part(part, has_checksums=True)
    old = pa.Table.from_pylist(
        [{name: row[name] for name in OLD_SCHEMA.names} for row in table.to_pylist()], OLD_SCHEMA
    )
    part.unlink()
    with pa.ipc.new_file(part, OLD_SCHEMA) as file:
        file.write_table(old)
    with pytest.raises(ValueError, match=r"is damaged \(its columns are not those of maps\); remove it and run"):
        scorer_of(folder, manifest)
    key = json.loads((folder / "maps.json").read_text())
    (folder / "maps.json").write_text(json.dumps({**key, "format": 2}))
    expected = good(3)
    np.testing.assert_array_equal(scorer_of(folder, manifest).maps.read("3.mp4"), expected)
    videos = [manifest[row] for row in range(COUNT)]
    videos[5] = make_video(path="5.mp4", num_frames=39)  # one is computed again, so its part is written again
    write_manifest(tmp_path / "manifest.parquet", videos, tmp_path)
    changed = read_manifest(tmp_path / "manifest.parquet")
    scores(changed, folder)
    assert "checksum" in records.read_part(part, has_checksums=True).column_names
    np.testing.assert_array_equal(scorer_of(folder, changed).maps.read("3.mp4"), expected)


# What is in them


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_maps_that_are_not_finite_are_neither_written_nor_read(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def spoiled(row: int) -> NDArray[np.float16]:
        maps = good(row)
        maps[3, 0, 2, 2] = value if row == 4 else 0
        return maps

    with pytest.raises(ValueError, match=r"the maps computed for 4\.mp4 contain NaN or infinity, and were not written"):
        scores(manifest, tmp_path / "maps", spoiled)
    assert not list((tmp_path / "maps").glob("part-*.arrow"))
    monkeypatch.setattr("tgmae.masks.maps.writer._check_finite", lambda name, maps: None)  # an older version's
    scorer = scorer_of(scores(manifest, tmp_path / "maps", spoiled), manifest)
    assert scorer.score(manifest[3], clip(3)).shape == (4, 36)
    with pytest.raises(ValueError, match=r"the maps of 4\.mp4 in .*part-00000\.arrow contain NaN or infinity; remove"):
        scorer.score(manifest[4], clip(4, start=20))


@pytest.mark.parametrize(
    "shape",
    [(20, 2, 8, 6), (20, 2, 6, 7), (20, 1, 6, 8), (2, 20, 6, 8), (19, 2, 6, 8), (21, 2, 6, 8), (6, 8, 20, 2)],
)
def test_maps_of_another_shape_are_refused(tmp_path: Path, manifest: Manifest, shape: tuple[int, ...]) -> None:
    """Transposed, of another grid, of other captions, too few and too many: before anything is trained."""
    folder = scores(
        manifest, tmp_path / "maps", lambda row: np.zeros(shape if row == 2 else good(row).shape, np.float16)
    )
    words = rf"maps of another shape than its videos need, for 1 of {COUNT} videos, such as 2\.mp4 \[.*\] \(not \[20, 2"
    with pytest.raises(ValueError, match=words):
        scorer_of(folder, manifest)


def test_maps_of_another_type_are_refused_by_name(tmp_path: Path, manifest: Manifest) -> None:
    """As another writer may store them, with right checksums: twice the bytes that their shape needs."""
    folder = scores(manifest, tmp_path / "maps")
    part = folder / "part-00000.arrow"
    table = records.read_part(part, has_checksums=True)
    digests = table.column("digest").to_pylist()
    rows = [
        records.make_record(f"{row}.mp4", digests[row], good(row).astype(np.float32), {"dtype": "float32"})
        for row in range(len(table))
    ]
    with pa.ipc.new_file(part, table.schema) as writer:
        writer.write_table(pa.Table.from_batches(rows).replace_schema_metadata(table.schema.metadata))
    words = r"the maps of 0\.mp4 in .*part-00000\.arrow are not float16 of the shape beside them .*; remove that file"
    with pytest.raises(ValueError, match=words):
        scorer_of(folder, manifest).score(manifest[0], clip())


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("every", None), ("every", "2"), ("format", None)])
def test_numbers_in_the_key_are_whole_and_positive(
    tmp_path: Path, manifest: Manifest, name: str, value: object
) -> None:
    folder = scores(manifest, tmp_path / "maps")
    key = json.loads((folder / "maps.json").read_text())
    (folder / "maps.json").write_text(json.dumps({**key, name: value}))
    with pytest.raises(ValueError, match=rf"maps\.json is damaged: {name} is {value!r}, expected a whole number"):
        scorer_of(folder, manifest)


def test_a_video_that_breaks_off_is_said_to(tmp_path: Path, manifest: Manifest) -> None:
    folder = scores(manifest, tmp_path / "maps", lambda row: Broken(good(row)[:7], "cut") if row == 2 else good(row))
    note = scorer_of(folder, manifest).note
    assert note.startswith("1 video could be read in part only when ")
    assert "such as 2.mp4; clips from their ends get the last maps before" in note


def test_a_mirrored_or_other_stream_has_maps_of_its_own() -> None:
    """A manifest made again, which now knows that a video is mirrored, does not take the maps of before."""
    digests = {
        digest_videos(Manifest.of([make_video(path="a.mp4", **changes)], Path()))[0]
        for changes in ({}, {"mirrored": True}, {"stream": 1}, {"stream": 1, "mirrored": True})
    }
    assert len(digests) == 4


# Live scorers


class Fixed:
    note, needs_text = "", False

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def __call__(self, clips: ClipBatch, text: Tensor | None = None) -> Tensor:
        return self.scores


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_live_score_that_is_not_finite_is_an_error_with_its_video(manifest: Manifest, value: float) -> None:
    frames = torch.zeros(3, 8, 96, 96, 3, dtype=torch.uint8)
    clips = clip_batch(frames, [clip(row) for row in (5, 6, 7)], manifest)
    values = torch.rand(3, 4, 36)
    assert torch.equal(BoundScorer(Fixed(values), None)(clips), values)
    values[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"^the scores of 6\.mp4 contain NaN or infinity"):
        BoundScorer(Fixed(values), None)(clips)


def test_a_clip_that_gives_nan_names_video_and_caption(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engines.clip_model

    write_numbered(tmp_path / "a.mp4", num_frames=16)
    (tmp_path / "list.csv").write_text("path,caption\na.mp4,a square\n")
    index_folder(tmp_path, tmp_path / "m.parquet", csv_path=tmp_path / "list.csv", num_workers=1)
    spoiled = load_clip(CLIP)
    spoiled.visual.proj.data[0, 0] = torch.nan  # type: ignore[union-attr,operator]
    spoiled = replace(spoiled, files="spoiled")
    monkeypatch.setattr("tgmae.masks.maps.build_scores.load_clip", lambda config: spoiled)
    assert engines.clip_model.load_clip is load_clip
    with pytest.raises(
        ValueError, match=r"^a\.mp4, caption 'a square': CLIP gives NaN for \d+ of \d+ scores in float32"
    ):
        build_scores(
            read_manifest(tmp_path / "m.parquet"), tmp_path / "scores", replace(CLIP, cache_dir=cache_dir),
            TowerSpec(kind="patch"), cells=6, patch_size=16, every=2, device=CPU, num_workers=0,
        )  # fmt: skip
    assert not list((tmp_path / "scores").glob("part-*.arrow"))


def test_motion_folders_have_checksums_too(tmp_path: Path, manifest: Manifest) -> None:
    def compute(rows: list[int]) -> Iterator[NDArray[np.int8]]:
        yield from (np.zeros((40, 2, 8, 10), np.int8) for _ in rows)

    write_maps(manifest, digest_videos(manifest), tmp_path / "motion", MOTION_KEY, "tgmae-data motion", compute)
    assert "checksum" in records.read_part(tmp_path / "motion" / "part-00000.arrow", has_checksums=True).column_names
