"""Score maps: what is stored, how a request reads it, what a kill leaves, and what is refused.

Dimensions: F scored frames, C captions, Y X cells, S slots, N patches a slot.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from dali_pipelines.pyav_pipeline import PyavPipeline
from dali_pipelines.types import Caption, ClipRequest, CropBox
from dali_pipelines.video.decode import decode_clips, decode_whole_frames
from dali_pipelines.workers.team import Team
from engines.clip_model import SHAPES_CLIP, load_clip
from engines.config import CLIPConfig, TowerSpec
from engines.engine import Engine
from engines.patch_similarity import make_patch_similarity
from tests.support.videos import clip_batch, make_video, stamp, write_numbered
from tests.tgmae.masks.test_text_scorer import score_naively
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.data.sampling import ClipSampler
from tgmae.masks.cached_scorer import COMMAND, CachedScorer
from tgmae.masks.maps.build_scores import build_scores
from tgmae.masks.maps.frames import grid_of
from tgmae.masks.maps.store import MapFolder, write_key
from tgmae.masks.maps.writer import BuildResult
from tgmae.masks.motion_field import MOTION_KEY
from tgmae.masks.scorer import bind_scorer, make_scorer

REPOSITORY = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
CELLS, PATCH, EVERY = 6, 16, 2
PART = 5  # videos in a part, here
SECOND_CAPTION = "a blue star spinning"


def with_captions(manifest: Manifest, captions: Sequence[Sequence[str]]) -> Manifest:
    return manifest.with_captions([[Caption(text, "test") for text in texts] for texts in captions])


def two_captions(path: Path) -> Manifest:
    """Twelve shapes clips; every second one has another caption besides its own."""
    whole = read_manifest(path)
    manifest = Manifest(whole.table.slice(0, 12), whole.root)
    own = manifest.table.column("captions").to_pylist()
    return with_captions(manifest, [[*texts, SECOND_CAPTION][: 1 + row % 2] for row, texts in enumerate(own)])


def build(manifest: Manifest, out: Path, cache_dir: Path, model: str = "shapes", **options: object) -> BuildResult:
    """build_scores with this module's settings, in parts of five videos."""
    tower = MaskConfig(scorer=options.pop("scorer", "patch")).tower()  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tgmae.masks.maps.writer.PART_VIDEOS", PART)
        return build_scores(
            manifest, out, CLIPConfig(model=model, cache_dir=cache_dir), tower,
            **{"cells": CELLS, "patch_size": PATCH, "every": EVERY, "device": CPU, "num_workers": 0, **options},  # type: ignore[arg-type]
        )  # fmt: skip


def parts(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("part-*.arrow"))]


@pytest.fixture(scope="module")
def manifest(shapes: Path) -> Manifest:
    return two_captions(shapes)


@pytest.fixture(scope="module")
def maps(manifest: Manifest, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps") / "scores"
    result = build(manifest, folder, cache_dir)
    assert (result.num_videos, result.num_reused, result.skipped) == (12, 0, [])
    assert result.num_bytes == sum(len(part) for part in parts(folder))
    return folder


@pytest.fixture
def copied(maps: Path, tmp_path: Path) -> Path:
    """The same maps, to spoil."""
    return Path(shutil.copytree(maps, tmp_path / "scores"))


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny CLIP with one weight changed."""
    folder = Path(shutil.copytree(SHAPES_CLIP, tmp_path_factory.mktemp("clip") / "other"))
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] += 1e-3
    save_file(weights, folder / "open_clip_model.safetensors")
    return str(folder)


def config(maps: Path, cache_dir: Path, **changes: object) -> InputConfig:
    plain = InputConfig(
        model=ModelConfig(image_size=CELLS * PATCH, num_frames=8),
        data=DataConfig(stride=4, flip=True),
        mask=MaskConfig(scorer="cached", scores=maps),
        clip=CLIPConfig(model="shapes", cache_dir=cache_dir),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def request(row: int, frames: tuple[int, ...], crop: CropBox, flip: bool = False, caption: int = 0) -> ClipRequest:
    return ClipRequest(row=row, epoch=0, position=0, frames=frames, crop=crop, flip=flip, caption=caption, mask_seed=0)


# What is stored


@pytest.mark.parametrize(
    ("width", "height", "cells", "grid"),
    [(160, 120, 6, (6, 8)), (120, 160, 6, (8, 6)), (1920, 1080, 14, (14, 25)), (100, 1000, 5, (50, 5)),
     (224, 224, 14, (14, 14)), (7, 5, 14, (14, 20))],
)  # fmt: skip
def test_grid_has_square_cells(width: int, height: int, cells: int, grid: tuple[int, int]) -> None:
    assert grid_of(make_video(width=width, height=height), cells) == grid


@pytest.mark.slow
def test_maps_are_the_scores_of_whole_pictures(manifest: Manifest, maps: Path) -> None:
    """Against enlarging and encoding every cell of every second frame, for each caption."""
    clip = load_clip(CLIPConfig(model="shapes"))
    video = manifest[1]
    stored = MapFolder(maps, COMMAND).read(video.path)
    assert (stored.dtype, stored.shape) == (np.float16, (20, 2, 6, 8))
    numbers = [0, 18, 38]
    pictures = torch.from_numpy(
        np.stack(list(decode_whole_frames(manifest.file(1), video, numbers, 6 * PATCH, 8 * PATCH)))
    )
    for caption, text in enumerate(video.texts):
        expected = score_naively(clip, pictures, [text] * 3).reshape(3, 6, 8)
        # float16 keeps 11 bits: 2⁻¹² of the value.
        np.testing.assert_allclose(stored[[0, 9, 19], caption], expected, rtol=2**-11, atol=1e-4)


@pytest.mark.slow
def test_key_says_what_the_maps_depend_on(maps: Path) -> None:
    fingerprint = load_clip(CLIPConfig(model="shapes")).fingerprint
    expected = {
        "format": 3,
        "dtype": "float16",
        "clip": fingerprint,
        "clip_identity": CLIPConfig(model="shapes").identity(),
        "tower": "patch16",
        "patch_size": 16,
        "cells": CELLS,
        "every": EVERY,
    }
    assert json.loads((maps / "maps.json").read_text()) == expected
    assert sorted(path.name for path in maps.iterdir()) == [
        "maps.json",
        *(f"part-0000{n}.arrow" for n in range(3)),
        "writing.lock",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_video_is_scored_upright(tmp_path: Path, cache_dir: Path, rotation: int) -> None:
    """Pictures and maps are those of the same video stored upright; a wrong turn would be seen."""
    for name, turned in (("plain", 0), ("turned", rotation)):
        write_numbered(tmp_path / f"{name}.mp4", num_frames=16, rotation=turned, crf="5")
    index_folder(tmp_path, tmp_path / "manifest.parquet", num_workers=1)
    both = with_captions(read_manifest(tmp_path / "manifest.parquet"), [["a white square"]] * 2)
    assert [both[row].rotation for row in range(2)] == [0, rotation]
    plain, turned = (
        np.stack(list(decode_whole_frames(both.file(row), both[row], (3, 9), 96, 128))).astype(float)
        for row in range(2)
    )
    assert plain.shape == turned.shape == (2, 96, 128, 3)
    assert np.abs(plain - turned).mean() < 3
    assert np.abs(plain - turned[:, ::-1, ::-1]).mean() > 10
    build(both, tmp_path / "scores", cache_dir)
    stored = [MapFolder(tmp_path / "scores", COMMAND).read(both[row].path).astype(float) for row in range(2)]
    assert stored[0].shape == stored[1].shape == (8, 1, 6, 8)
    assert np.abs(stored[0] - stored[1]).mean() < 0.3 * np.abs(stored[0] - stored[1][..., ::-1, ::-1]).mean()


def test_pictures_are_those_of_a_plain_resize(manifest: Manifest) -> None:
    """PyAV's full pictures resized by torch, within the tolerance of the pipelines (bytes, mean)."""
    import av

    video = manifest[3]
    got = np.stack(list(decode_whole_frames(manifest.file(3), video, (0, 5, 39), 96, 128)))
    with av.open(manifest.file(3)) as container:
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])[[0, 5, 39]]
    wanted = F.interpolate(
        torch.from_numpy(whole).permute(0, 3, 1, 2).float(), (96, 128), mode="bilinear", antialias=True
    )
    assert np.abs(got.transpose(0, 3, 1, 2) - wanted.numpy()).mean() < 2


# How a request reads it


def test_crop_and_flip_are_grid_sample(manifest: Manifest, maps: Path, cache_dir: Path) -> None:
    """Bilinear at the patch centres of the crop, the border held beyond the outermost cells."""
    scorer = CachedScorer(config(maps, cache_dir), manifest, CPU)
    plan = ClipSampler(manifest=manifest, data=DataConfig(flip=True), num_frames=8, batch_size=48, seed=1)
    requests = [*plan(0), request(1, (0, 1, 9, 14, 22, 31, 38, 39), CropBox(x=3, y=5, width=11, height=7), caption=1)]
    assert {(r.flip, r.caption) for r in requests} == {(False, 0), (False, 1), (True, 0), (True, 1)}
    for wanted in requests:
        video = manifest[wanted.row]
        stored = torch.from_numpy(MapFolder(maps, COMMAND).read(video.path).astype(np.float64))
        numbers = [min(round(frame / EVERY), 19) for frame in wanted.frames]
        of_frames = stored[numbers, wanted.caption].view(4, 2, 6, 8).mean(1)
        step = (torch.arange(6, dtype=torch.float64) + 0.5) / 6
        x = (wanted.crop.x + step * wanted.crop.width) / video.width
        y = (wanted.crop.y + step * wanted.crop.height) / video.height
        grid = torch.stack([x[None, :].expand(6, 6), y[:, None].expand(6, 6)], dim=-1) * 2 - 1
        sampled = F.grid_sample(
            of_frames[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False
        )[0]
        expected = sampled.flip(-1) if wanted.flip else sampled
        got = scorer.score(video, wanted)
        assert (got.dtype, got.shape) == (np.float32, (4, 36))
        np.testing.assert_allclose(got, expected.flatten(1).numpy(), rtol=0, atol=1e-6)


def test_first_frame_only(manifest: Manifest, maps: Path, cache_dir: Path) -> None:
    mask = MaskConfig(scorer="cached", scores=maps, frames_per_tubelet=1)
    one = CachedScorer(config(maps, cache_dir, mask=mask), manifest, CPU)
    two = CachedScorer(config(maps, cache_dir), manifest, CPU)
    crop = CropBox(x=20, y=0, width=120, height=120)
    firsts = (0, 0, 8, 8, 20, 20, 30, 30)
    wanted = request(4, (0, 4, 8, 12, 20, 24, 30, 34), crop)
    np.testing.assert_array_equal(
        one.score(manifest[4], wanted), two.score(manifest[4], replace(wanted, frames=firsts))
    )
    assert np.abs(one.score(manifest[4], wanted) - two.score(manifest[4], wanted)).max() > 1e-3


def test_a_batch_is_its_clips(manifest: Manifest, maps: Path, cache_dir: Path) -> None:
    scorer = make_scorer(config(maps, cache_dir), manifest, CPU)
    assert isinstance(scorer, CachedScorer)
    plan = ClipSampler(manifest=manifest, data=DataConfig(flip=True), num_frames=8, batch_size=5, seed=1)
    clips = clip_batch(torch.zeros(5, 8, 96, 96, 3, dtype=torch.uint8), plan(0), manifest)
    scores = scorer(clips)
    assert (scores.dtype, scores.device.type, tuple(scores.shape)) == (torch.float32, "cpu", (5, 4, 36))
    np.testing.assert_array_equal(scores.numpy(), np.stack([scorer.score(manifest[r.row], r) for r in clips.requests]))


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["patch", "dense"])
def test_the_whole_picture_scores_as_directly(tmp_path: Path, cache_dir: Path, scorer: str) -> None:
    """A square video, uncropped, resized by FFmpeg both times: equal up to float16. Two sizes in one folder."""
    write_numbered(tmp_path / "a.mp4", num_frames=20, width=120, height=120)
    write_numbered(tmp_path / "b.mp4", num_frames=20, width=160, height=120)
    index_folder(tmp_path, tmp_path / "manifest.parquet", num_workers=1)
    videos = with_captions(read_manifest(tmp_path / "manifest.parquet"), [["a white square"], ["a red star"]])
    build(videos, tmp_path / "scores", cache_dir, scorer=scorer)
    cached = CachedScorer(config(tmp_path / "scores", cache_dir), videos, CPU)
    assert cached.maps.read(videos[1].path).shape == (10, 1, 6, 8)
    wanted = request(0, (2, 4, 6, 8, 10, 12, 14, 16), CropBox(x=0, y=0, width=120, height=120))
    frames = torch.from_numpy(decode_clips(videos.file(0), videos[0], [wanted], 96))
    directly = bind_scorer(config(tmp_path, cache_dir, mask=MaskConfig(scorer=scorer)), videos, CPU)  # type: ignore[arg-type]
    direct = directly(clip_batch(frames, [wanted], videos))[0].numpy()
    np.testing.assert_allclose(
        cached.score(videos[0], wanted), direct, rtol=0, atol=2**-12
    )  # half a float16 step below 1
    assert np.ptp(direct) > 0.02


def test_masks_agree_with_direct_scores(manifest: Manifest, maps: Path, cache_dir: Path) -> None:
    """On crops as training draws them: 21 of 36 patches are masked, so chance agrees on .58."""
    plain = config(maps, cache_dir)
    plan = ClipSampler(manifest=manifest, data=plain.data, num_frames=8, batch_size=12, seed=5)
    clips = PyavPipeline(manifest, plan, 96).next_batch()
    direct = bind_scorer(replace(plain, mask=MaskConfig()), manifest, CPU)(clips).numpy()
    cached = CachedScorer(plain, manifest, CPU)(clips).numpy()
    tops = [np.argsort(-scores, axis=-1)[..., :21].reshape(-1, 21) for scores in (direct, cached)]
    agreement = np.mean([len(set(a) & set(b)) / 21 for a, b in zip(*tops, strict=True)])
    assert agreement >= 0.75


# A kill, shares, damage

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from tests.tgmae.masks.test_score_maps import build, two_captions
replace, parts = os.replace, []
def kill_in_the_third_part(source, target):
    if "part-" in str(target):
        parts.append(target)
        if len(parts) == 3:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill_in_the_third_part
build(two_captions(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(
    shapes: Path, manifest: Manifest, maps: Path, tmp_path: Path, cache_dir: Path
) -> None:
    """Killed with the third part half written: the first two stay untouched, the end is as if nothing had happened."""
    folder = tmp_path / "scores"
    arguments = [sys.executable, "-c", KILLED_WHILE_WRITING, str(shapes), str(folder), str(cache_dir)]
    killed = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [half] = folder.glob("*.tmp")
    assert [path.name for path in sorted(folder.glob("part-*.arrow"))] == ["part-00000.arrow", "part-00001.arrow"]
    with pytest.raises(ValueError, match=r"has no maps, .* for 2 of 12 videos, such as .*tgmae-data scores"):
        CachedScorer(config(folder, cache_dir), manifest, CPU)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*.arrow")}
    result = build(manifest, folder, cache_dir)
    assert (result.num_videos, result.num_reused, result.skipped) == (0, 12, [])  # the third part's are in its journal
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert parts(folder) == parts(maps)
    assert (folder / "maps.json").read_bytes() == (maps / "maps.json").read_bytes()
    assert half.name.startswith("part-00002.arrow.")  # and whatever becomes of it, it is not read
    CachedScorer(config(folder, cache_dir), manifest, CPU)


def test_a_finished_folder_costs_nothing(manifest: Manifest, copied: Path, cache_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.glob("[mp]*")}
    result = build(manifest, copied, cache_dir)
    assert (result.num_videos, result.num_reused) == (0, 12)
    assert {path: path.stat().st_mtime_ns for path in copied.glob("[mp]*")} == before


def test_two_shares_are_one_whole(manifest: Manifest, maps: Path, tmp_path: Path, cache_dir: Path) -> None:
    """In either order, into one folder; each writes its own parts only."""
    second = build(manifest, tmp_path, cache_dir, team=Team(1, 2))
    assert [path.name for path in sorted(tmp_path.glob("part*"))] == ["part-00001.arrow"]
    first = build(manifest, tmp_path, cache_dir, team=Team(0, 2))
    assert (first.num_videos, second.num_videos) == (7, 5)
    assert first.num_bytes + second.num_bytes == sum(len(part) for part in parts(maps))
    assert parts(tmp_path) == parts(maps)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["empty", "cut", "garbage"])
def test_a_damaged_part_is_refused_and_made_anew(
    manifest: Manifest, maps: Path, copied: Path, cache_dir: Path, damage: str
) -> None:
    part = copied / "part-00001.arrow"
    whole = part.read_bytes()
    part.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "garbage": b"\1" * 3000}[damage])
    with pytest.raises(ValueError, match=r"part-00001\.arrow is damaged .*; remove it and run tgmae-data scores again"):
        CachedScorer(config(copied, cache_dir), manifest, CPU)
    assert build(manifest, copied, cache_dir).num_videos == PART
    assert parts(copied) == parts(maps)


# What is refused


def test_no_maps_at_all(tmp_path: Path, manifest: Manifest, cache_dir: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no maps in .*; make them with: tgmae-data scores"):
        CachedScorer(config(tmp_path / "nowhere", cache_dir), manifest, CPU)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"clip": "x"}'])
def test_a_folder_that_describes_something_else(copied: Path, manifest: Manifest, cache_dir: Path, text: str) -> None:
    (copied / "maps.json").write_text(text)
    with pytest.raises(ValueError, match=r"maps\.json does not describe maps"):
        CachedScorer(config(copied, cache_dir), manifest, CPU)
    with pytest.raises(ValueError, match=r"maps\.json does not describe maps"):
        build(manifest, copied, cache_dir)


def test_other_settings_are_refused_when_training(
    manifest: Manifest, maps: Path, cache_dir: Path, other_clip: str
) -> None:
    """Saying what differs: another grid of patches, other weights."""
    grid = config(maps, cache_dir, model=ModelConfig(image_size=64, num_frames=8))
    with pytest.raises(
        ValueError, match=r"were made with cells along the short side 6 \(now 4\); make maps in another folder"
    ):
        CachedScorer(grid, manifest, CPU)
    weights = config(maps, cache_dir, clip=CLIPConfig(model=other_clip, cache_dir=cache_dir))
    with pytest.raises(ValueError, match=r"were made with clip [0-9a-f]{16} \(now [0-9a-f]{16}\); make maps"):
        CachedScorer(weights, manifest, CPU)


def test_motion_vectors_are_not_score_maps(manifest: Manifest, tmp_path: Path, cache_dir: Path) -> None:
    write_key(tmp_path / "motion", MOTION_KEY, "tgmae-data motion")
    words = r"motion holds motion vectors, not score maps; use another folder, made with tgmae-data scores$"
    with pytest.raises(ValueError, match=words):
        CachedScorer(config(tmp_path / "motion", cache_dir), manifest, CPU)


def test_other_settings_are_refused_when_building(
    manifest: Manifest, copied: Path, cache_dir: Path, other_clip: str
) -> None:
    """And nothing that is there is touched."""
    before = {path: path.read_bytes() for path in copied.iterdir()}
    cases: list[tuple[dict[str, object], str]] = [
        ({"every": 4}, r"every 2 \(now 4\)"),
        ({"cells": 4}, r"cells along the short side 6 \(now 4\)"),
        ({"patch_size": 8}, r"tower patch16 \(now patch8\), patch_size 16 \(now 8\)"),
        ({"scorer": "dense"}, r"tower patch16 \(now clearclip16\)"),
        ({"model": other_clip}, r"clip [0-9a-f]{16} \(now [0-9a-f]{16}\)"),
        ({"every": 4, "cells": 4}, r"cells along the short side 6 \(now 4\), every 2 \(now 4\)"),
    ]
    for options, words in cases:
        with pytest.raises(ValueError, match=rf"were made with {words}; make maps in another folder"):
            build(manifest, copied, cache_dir, **options)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in copied.iterdir()} == before


def test_other_captions_are_refused_and_named(manifest: Manifest, copied: Path, cache_dir: Path) -> None:
    """Changed, reordered or added ones; scoring again replaces the parts they lie in and no other."""
    captions = manifest.table.column("captions").to_pylist()
    captions[6] = [captions[6][0] + " slowly"]
    captions[7] = captions[7][::-1]
    captions[8] = [*captions[8], "something else"]
    changed = with_captions(manifest, captions)
    named = ", ".join(manifest[row].path for row in (6, 7, 8))
    with pytest.raises(ValueError, match=rf"of other videos or captions, for 3 of 12 videos, such as {named};"):
        CachedScorer(config(copied, cache_dir), changed, CPU)
    result = build(changed, copied, cache_dir)
    assert (result.num_videos, result.num_reused) == (3, 9)
    CachedScorer(config(copied, cache_dir), changed, CPU)


def test_missing_videos_are_named(manifest: Manifest, maps: Path, cache_dir: Path) -> None:
    moved = [f"new/{number}.mp4" if number > 9 else path for number, path in
             enumerate(manifest.table.column("path").to_pylist())]  # fmt: skip
    column = manifest.table.schema.get_field_index("path")
    other = Manifest(manifest.table.set_column(column, "path", pa.array(moved)), manifest.root)
    with pytest.raises(ValueError, match=r"2 of 12 videos, such as new/10\.mp4, new/11\.mp4; add them with: tgmae"):
        CachedScorer(config(maps, cache_dir), other, CPU)
    cells = pa.array([*["train"] * 10, "test1,train2", "train1,train2"])
    column = manifest.table.schema.get_field_index("split")
    several = Manifest(other.table.set_column(column, "split", cells), manifest.root)
    with pytest.raises(ValueError, match=r" --data\.split train2$"):
        CachedScorer(config(maps, cache_dir), several, CPU)


def test_rows_of_a_split_find_their_maps(manifest: Manifest, maps: Path, cache_dir: Path) -> None:
    """Maps are found by path: a part of the manifest, in another order, reads the same."""
    table = manifest.table.take(pa.array([11, 3, 9]))
    some = CachedScorer(config(maps, cache_dir), Manifest(table, manifest.root), CPU)
    every = CachedScorer(config(maps, cache_dir), manifest, CPU)
    crop, frames = CropBox(x=20, y=0, width=120, height=120), (0, 4, 8, 12, 16, 20, 24, 28)
    for row, place in ((11, 0), (3, 1), (9, 2)):
        np.testing.assert_array_equal(
            some.score(manifest[row], request(place, frames, crop, caption=1)),
            every.score(manifest[row], request(row, frames, crop, caption=1)),
        )


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_video_is_recorded_reported_and_named(tmp_path: Path, cache_dir: Path, num_workers: int) -> None:
    for name in "abcd":
        write_numbered(tmp_path / f"{name}.mp4", num_frames=16)
    index_folder(tmp_path, tmp_path / "manifest.parquet", num_workers=1)
    videos = with_captions(read_manifest(tmp_path / "manifest.parquet"), [["a square"]] * 4)
    (tmp_path / "b.mp4").unlink()
    os.truncate(tmp_path / "c.mp4", 1500)
    result = build(videos, tmp_path / "scores", cache_dir, num_workers=num_workers)
    assert (result.num_videos, [video.path for video in result.skipped]) == (2, ["b.mp4", "c.mp4"])
    assert all(video.reason for video in result.skipped)
    scorer = CachedScorer(config(tmp_path / "scores", cache_dir), videos, CPU)
    assert re.match(r"2 videos could not be read when .*scores was made, such as b\.mp4, c\.mp4;", scorer.note)
    crop = CropBox(x=0, y=0, width=120, height=120)
    for row in (0, 3):
        assert np.isfinite(scorer.score(videos[row], request(row, tuple(range(8)), crop))).all()
    for row, name in ((1, "b.mp4"), (2, "c.mp4")):
        with pytest.raises(ValueError, match=rf"^{name} could not be read when .* was made; run tgmae-data scores"):
            scorer.score(videos[row], request(row, tuple(range(8)), crop))


def arrays(folder: Path, manifest: Manifest) -> list[NDArray[np.float16]]:
    return [MapFolder(folder, COMMAND).read(manifest[row].path) for row in range(len(manifest))]


@pytest.mark.slow
def test_parts_of_another_length_read_the_same(
    manifest: Manifest, maps: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part for all, made by a worker process, holds what three parts made in one process hold."""
    monkeypatch.setitem(globals(), "PART", 64)
    build(manifest, tmp_path, cache_dir, num_workers=1)
    assert len(parts(tmp_path)) == 1
    for one, other in zip(arrays(tmp_path, manifest), arrays(maps, manifest), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_video_that_breaks_half_way_keeps_the_maps_before(tmp_path: Path, cache_dir: Path) -> None:
    """Its clips from there can be trained on; those behind the break cannot be decoded anyway."""
    write_numbered(tmp_path / "a.mkv", num_frames=40)
    index_folder(tmp_path, tmp_path / "manifest.parquet", num_workers=1)
    videos = with_captions(read_manifest(tmp_path / "manifest.parquet"), [["a white square"]])
    whole = build(videos, tmp_path / "whole", cache_dir)
    os.truncate(tmp_path / "a.mkv", (tmp_path / "a.mkv").stat().st_size * 6 // 10)
    videos = Manifest.of([stamp(videos[0], tmp_path / "a.mkv")], tmp_path)  # broken when it was indexed already
    broken = build(videos, tmp_path / "broken", cache_dir)
    assert (whole.num_videos, broken.num_videos, broken.skipped) == (1, 1, [])
    before, after = (MapFolder(tmp_path / name, COMMAND).read("a.mkv") for name in ("whole", "broken"))
    assert 1 < len(after) < len(before)
    whole_frames = len(after) - 1  # the last packet is cut, and decodes to part of a picture
    np.testing.assert_array_equal(after[:whole_frames], before[:whole_frames])


def test_maps_of_a_replaced_video_are_refused(manifest: Manifest, maps: Path, cache_dir: Path) -> None:
    """The same path and captions, another recording."""
    videos = [manifest[row] for row in range(len(manifest))]
    videos[3] = replace(videos[3], num_frames=videos[3].num_frames + 80)
    other = Manifest.of(videos, manifest.root)
    with pytest.raises(ValueError, match=rf"maps of other videos or captions, for 1 of 12 .* {manifest[3].path};"):
        CachedScorer(config(maps, cache_dir), other, CPU)


def test_a_pass_never_holds_more_than_the_engine_takes(cache_dir: Path) -> None:
    """A plan has a largest batch; wide pictures must be cut to it, whatever came before them."""
    sizes: list[int] = []

    class Watched:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.device, self.dtype = engine, engine.device, engine.dtype

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            return self.engine(x)

    clip_config = CLIPConfig(model="shapes", batch=40, cache_dir=cache_dir)
    features = make_patch_similarity(load_clip(clip_config), clip_config, TowerSpec(kind="patch"), PATCH, 96, 96, CPU)
    assert features.batch == 36
    features.engine = Watched(features.engine)
    for width in (96, 176, 320):
        frames = torch.randint(0, 256, (3, 96, width, 3), dtype=torch.uint8)
        texts = F.normalize(torch.randn(3, 1, 64), dim=-1)
        features.batch = 36
        cut = features.compare(frames, texts)
        assert max(sizes) <= 36
        features.batch = 10_000
        torch.testing.assert_close(cut, features.compare(frames, texts), rtol=0, atol=2e-6)
        sizes.clear()
