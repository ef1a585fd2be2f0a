"""What earlier versions wrote is read, and what later ones wrote is refused with what to do.

The digests and fingerprints are those that commit c233382 computed: with others, every checkpoint, score map and
motion folder made before would be refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import engines.clip_model
from dali_pipelines.types import Caption, Video
from engines.clip_model import SHAPES_CLIP
from engines.config import CLIPConfig, TowerSpec
from tests.support.videos import make_video
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig, TrainConfig
from tgmae.config.saved import from_dict, to_dict
from tgmae.data.manifest import FORMAT, FORMAT_KEY, ROOT_KEY, SCHEMA, Manifest, read_manifest, write_manifest
from tgmae.masks.cached_scorer import COMMAND, CachedScorer, score_key
from tgmae.masks.maps.build_scores import build_scores
from tgmae.masks.maps.store import FORMAT as MAP_FORMAT
from tgmae.masks.maps.store import MapFolder, digest_videos, write_key
from tgmae.masks.maps.writer import write_maps
from tgmae.masks.motion_field import COMMAND as MOTION_COMMAND
from tgmae.masks.motion_field import MOTION_KEY, CodecMotion
from tgmae.masks.scorer import bind_scorer
from tgmae.model.pretraining import Pretraining
from tgmae.model.videomae import VideoMAE
from tgmae.training.checkpoints.folder import FORMAT as CHECKPOINT_FORMAT
from tgmae.training.checkpoints.read import load_checkpoint
from tgmae.training.checkpoints.restore import changed_settings, restore
from tgmae.training.checkpoints.write import Checkpoints, save_checkpoint
from tgmae.training.optim import make_optimizer

CPU = torch.device("cpu")

# Manifests

VIDEOS = [
    make_video(),
    make_video(
        path="läuft/b 2.webm", codec="vp9", width=320, height=241, num_frames=9, captions=(), rotation=90, split="val"
    ),
    make_video(path="c.mkv", num_frames=300, num_bytes=2**40, captions=("日本語",)),
]
ADDED = ("start_frame", "end_frame", "caption_sources")


def write_format_1(path: Path, videos: list[Video]) -> Path:
    """Write a manifest as c233382 did: without segments, sources, streams, mirroring, digests and a format number."""
    names = [name for name in SCHEMA.names if name not in (*ADDED, "stream", "mirrored", "digest")]
    columns = {name: [getattr(video, name) for video in videos] for name in names}
    columns["captions"] = [list(video.texts) for video in videos]
    schema = pa.schema([SCHEMA.field(name) for name in names]).with_metadata({ROOT_KEY: b"."})
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")
    return path


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write_format_1(tmp_path / "manifest.parquet", VIDEOS)


def test_a_manifest_of_format_1_has_whole_files_without_sources(old: Path, tmp_path: Path) -> None:
    manifest = read_manifest(old)
    expected = [
        replace(video, captions=tuple(Caption(caption.text, "") for caption in video.captions)) for video in VIDEOS
    ]
    assert [manifest[row] for row in range(3)] == expected
    assert all(video.segment is None for video in expected)
    assert manifest.names() == [video.path for video in VIDEOS]
    assert manifest.captions() == [list(video.captions) for video in expected]
    assert manifest.root == tmp_path.resolve()


def test_fingerprint_and_digests_are_those_of_before(old: Path, tmp_path: Path) -> None:
    """Of a manifest of format 1, and of the same videos written now."""
    new = tmp_path / "new.parquet"
    write_manifest(new, VIDEOS, tmp_path)
    for manifest in (read_manifest(old), read_manifest(new)):
        assert manifest.fingerprint == "3 (paths and captions 65ea880be075)"
        assert manifest.select_split("train").fingerprint == "2 (paths and captions 85cafeae1af2)"
        assert digest_videos(manifest) == ["9fad834df632", "0c0f8a93848c", "c863b0d1df68"]
        assert digest_videos(manifest, "captions") == ["acd2460afa27", "8fb7faa9eff6", "f00994dfeb40"]


def test_foreign_columns_do_not_pass_for_segments(old: Path) -> None:
    """A format 1 manifest to which somebody added columns of those names."""
    table = pq.read_table(old)
    for name in ("start_frame", "caption_sources"):
        table = table.append_column(name, pa.array(["x", "y", "z"]))
    pq.write_table(table, old)
    assert [read_manifest(old)[row].segment for row in range(3)] == [None] * 3


def test_format_2_needs_all_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, VIDEOS, tmp_path)
    assert pq.read_schema(path).metadata[FORMAT_KEY] == b"4"
    for name in ADDED:
        pq.write_table(pq.read_table(path).drop([name]), tmp_path / "cut.parquet")
        with pytest.raises(
            ValueError, match=rf"columns \['{name}'\] are missing; make it again with: tgmae-data index"
        ):
            read_manifest(tmp_path / "cut.parquet")


@pytest.mark.parametrize("number", [str(FORMAT + 1), "10", "0", "-1", "two", ""])
def test_a_manifest_of_another_format_is_refused(tmp_path: Path, number: str) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, VIDEOS, tmp_path)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, FORMAT_KEY: number.encode()}), path)
    message = (
        rf"manifest\.parquet has manifest format {number}, but this version of tgmae reads formats up to {FORMAT}; "
        r"update tgmae, or make it again with: tgmae-data index FOLDER --out .*manifest\.parquet"
    )
    with pytest.raises(ValueError, match=message):
        read_manifest(path)


# Score maps and motion


@pytest.fixture(scope="module")
def one(shapes: Path) -> Manifest:
    whole = read_manifest(shapes)
    return Manifest(whole.table.slice(0, 1), whole.root)


@pytest.fixture(scope="module")
def made(one: Manifest, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps") / "scores"
    make(one, folder, cache_dir)
    return folder


def make(manifest: Manifest, folder: Path, cache_dir: Path) -> int:
    """Make score maps of every tenth frame; return of how many videos they were computed."""
    clip = CLIPConfig(model="shapes", cache_dir=cache_dir)
    return build_scores(
        manifest, folder, clip, TowerSpec(kind="patch"), cells=2, patch_size=16, every=10, device=CPU, num_workers=0
    ).num_videos


@pytest.fixture
def maps(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "scores"))


def config(maps: Path, cache_dir: Path, model: str = "shapes") -> InputConfig:
    return InputConfig(
        model=ModelConfig(image_size=32, num_frames=8), mask=MaskConfig(scorer="cached", scores=maps, ratio=0.5),
        clip=CLIPConfig(model=model, cache_dir=cache_dir),
    )  # fmt: skip


def change_key(folder: Path, **changes: object) -> None:
    """Change entries of maps.json; None removes one."""
    key = json.loads((folder / "maps.json").read_text()) | changes
    (folder / "maps.json").write_text(json.dumps({name: value for name, value in key.items() if value is not None}))


class ClipLoaded(Exception):
    pass


@pytest.fixture
def no_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: CLIPConfig) -> None:
        raise ClipLoaded

    monkeypatch.setattr(engines.clip_model, "load_clip", refuse)


def test_maps_of_the_clip_in_use_load_no_clip(maps: Path, one: Manifest, cache_dir: Path, no_clip: None) -> None:
    key = json.loads((maps / "maps.json").read_text())
    assert (key["format"], key["clip_identity"]) == (MAP_FORMAT, CLIPConfig(model="shapes").identity())
    bound = bind_scorer(config(maps, cache_dir), one, CPU)
    assert isinstance(bound.scorer, CachedScorer)
    assert bound.captions is None


def test_the_same_clip_under_another_name(
    maps: Path, one: Manifest, cache_dir: Path, tmp_path: Path, no_clip: None
) -> None:
    """A copied folder has the same identity, and is not loaded."""
    copied = str(shutil.copytree(SHAPES_CLIP, tmp_path / "copied"))
    assert CLIPConfig(model=copied).identity() == CLIPConfig(model="shapes").identity()
    assert CachedScorer(config(maps, cache_dir, copied), one, CPU).note == ""


def test_another_clip_is_refused_by_name_before_it_is_downloaded(
    maps: Path, one: Manifest, cache_dir: Path, no_clip: None
) -> None:
    """Geometry first, then the names. Only a CLIP that is here may still be the same one."""
    words = r"were made with the CLIP 'shapes' \(now 'ViT-B-32-quickgelu openai'\); give the --clip.model"
    with pytest.raises(ValueError, match=words):
        CachedScorer(config(maps, cache_dir, "ViT-B-32-quickgelu"), one, CPU)
    other = replace(config(maps, cache_dir, "ViT-B-32-quickgelu"), model=ModelConfig(image_size=64, num_frames=8))
    with pytest.raises(ValueError, match=r"were made with cells along the short side 2 \(now 4\)"):
        CachedScorer(other, one, CPU)
    change_key(maps, clip_identity="ViT-B-32 laion2b")
    with pytest.raises(ClipLoaded):
        CachedScorer(config(maps, cache_dir), one, CPU)


def test_an_identity_changes_with_a_file(tmp_path: Path) -> None:
    """In a folder by weights and configuration, for a checkpoint by the file itself; a tag has nothing but its name."""
    folder = Path(shutil.copytree(SHAPES_CLIP, tmp_path / "clip"))
    before = CLIPConfig(model=str(folder)).identity()
    assert before == CLIPConfig(model=str(folder), weights="not used").identity()
    (folder / "README.md").write_text("other words")
    assert CLIPConfig(model=str(folder)).identity() == before
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert CLIPConfig(model=str(folder)).identity() != before, name
        before = CLIPConfig(model=str(folder)).identity()
    file = tmp_path / "weights.pt"
    file.write_bytes(b"one")
    named = CLIPConfig(model="ViT-B-32", weights=str(file)).identity()
    file.write_bytes(b"three")
    assert CLIPConfig(model="ViT-B-32", weights=str(file)).identity() != named
    assert CLIPConfig(model="ViT-B-32", weights="openai").identity() == "ViT-B-32 openai"


def test_maps_made_before_the_identity_are_read(maps: Path, one: Manifest, cache_dir: Path) -> None:
    """Another CLIP's are still refused. Running the command again adds the identity and computes nothing."""
    whole = (maps / "maps.json").read_text()
    change_key(maps, format=None, clip_identity=None)
    old = (maps / "maps.json").read_text()
    assert CachedScorer(config(maps, cache_dir), one, CPU).note == ""
    change_key(maps, clip="0123456789abcdef")
    with pytest.raises(ValueError, match=r"were made with clip 0123456789abcdef \(now [0-9a-f]{16}\)"):
        CachedScorer(config(maps, cache_dir), one, CPU)
    (maps / "maps.json").write_text(old)
    parts = {path: path.read_bytes() for path in maps.glob("part-*")}
    assert make(one, maps, cache_dir) == 0
    assert (maps / "maps.json").read_text() == whole
    assert {path: path.read_bytes() for path in maps.glob("part-*")} == parts


def test_an_identity_from_elsewhere_is_kept(maps: Path, one: Manifest, cache_dir: Path) -> None:
    """Maps that another checkout made: the fingerprint decides."""
    change_key(maps, clip_identity="shapes somewhere else")
    before = (maps / "maps.json").read_text()
    assert make(one, maps, cache_dir) == 0
    assert (maps / "maps.json").read_text() == before
    assert CachedScorer(config(maps, cache_dir), one, CPU).note == ""


def test_score_maps_of_a_later_format_are_refused(maps: Path, one: Manifest, cache_dir: Path, no_clip: None) -> None:
    change_key(maps, format=MAP_FORMAT + 1, unheard_of=1)
    message = (
        rf"maps\.json has format {MAP_FORMAT + 1}, but this version of tgmae reads formats up to {MAP_FORMAT}; update "
        "tgmae, or make the maps again in another folder with: tgmae-data scores MANIFEST --out FOLDER"
    )
    before = (maps / "maps.json").read_text()
    with pytest.raises(ValueError, match=message):
        CachedScorer(config(maps, cache_dir), one, CPU)
    with pytest.raises(ValueError, match=message):
        write_key(maps, score_key("c", "i", "patch16", 16, 2, 10), COMMAND)
    assert (maps / "maps.json").read_text() == before
    change_key(maps, dtype=None)  # whatever else a later format changes
    with pytest.raises(ValueError, match=message):
        CachedScorer(config(maps, cache_dir), one, CPU)


def test_motion_of_other_formats(tmp_path: Path) -> None:
    manifest = read_manifest(write_format_1(tmp_path / "manifest.parquet", VIDEOS[:1]))
    folder = tmp_path / "motion"

    def compute(rows: list[int]) -> Iterator[np.ndarray]:
        yield np.ones((40, 2, 8, 10), np.int8)

    write_maps(manifest, digest_videos(manifest), folder, MOTION_KEY, MOTION_COMMAND, compute)
    assert json.loads((folder / "maps.json").read_text()) == {"format": MAP_FORMAT, **MOTION_KEY}
    change_key(folder, format=None)
    assert CodecMotion(folder, manifest, CPU).note == ""
    assert MapFolder(folder, MOTION_COMMAND).read("walk/a.mp4").shape == (40, 2, 8, 10)
    change_key(folder, format=MAP_FORMAT + 1)
    with pytest.raises(ValueError, match=r"update tgmae, or make the maps again .*: tgmae-data motion MANIFEST"):
        CodecMotion(folder, manifest, CPU)


# Checkpoints

SMALL = ModelConfig(
    image_size=32, num_frames=4, width=24, depth=1, num_heads=2, decoder_width=12, decoder_depth=1, decoder_num_heads=2
)
TRAIN = TrainConfig(model=SMALL, batch_size=4, device_batch_size=4)


def train_a_step(seed: int) -> tuple[Pretraining, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Pretraining(VideoMAE(SMALL))
    optimizer = make_optimizer(model, TRAIN.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("number", [None, 2])
def test_a_checkpoint_of_an_earlier_format_resumes(tmp_path: Path, number: int | None) -> None:
    """They hold the autoencoder alone, and the first had no number and no names of the optimiser's parameters."""
    model, optimizer = train_a_step(0)
    path = save_checkpoint(tmp_path, 3, model, optimizer, TRAIN, "videos")
    state = torch.load(path, weights_only=True)
    assert state.pop("format") == CHECKPOINT_FORMAT
    state["model"] = {name.removeprefix("mae."): weight for name, weight in state["model"].items()}
    names = [[name.removeprefix("mae.") for name in group] for group in state.pop("parameters")]
    torch.save(state if number is None else {**state, "format": number, "parameters": names}, path)
    other, other_optimizer = train_a_step(1)
    assert restore(load_checkpoint(path), path, other, other_optimizer, TRAIN, "videos") == 3
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_settings_that_came_later_mean_what_was_done_before() -> None:
    """A run saved before there was validation had none; resumed with it, it says so and nothing else."""
    plain = to_dict(TRAIN)
    del plain["validation"]
    assert from_dict(plain, "config.json").validation == replace(TRAIN.validation, every=0)
    assert changed_settings({"config": plain}, TRAIN) == ["--validation.every 0.0 → 1.0"]


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, *train_a_step(0), TRAIN, "videos")
    state = torch.load(path, weights_only=True)
    torch.save({**state, "format": CHECKPOINT_FORMAT + 1}, path)
    message = (
        rf"step_00000003\.pt has checkpoint format {CHECKPOINT_FORMAT + 1}, but this version of tgmae reads formats up "
        rf"to {CHECKPOINT_FORMAT}; update tgmae, or start from its weights with --init-from RUN/hf"
    )
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)
    torch.save({"format": CHECKPOINT_FORMAT + 1, "weights": {}}, path)  # whatever else a later format changes
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_checkpoints_save_each_step_once(tmp_path: Path) -> None:
    """A step that was saved or resumed from is not written again, and only the newest stay."""
    config = replace(TRAIN, log=replace(TRAIN.log, keep_checkpoints=2))
    checkpoints = Checkpoints(tmp_path, config, *train_a_step(0), "videos")
    for step in (1, 2, 3):
        checkpoints.save(step)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002.pt", "step_00000003.pt"]
    before = (tmp_path / "step_00000003.pt").stat().st_mtime_ns
    checkpoints.save(3)
    assert (tmp_path / "step_00000003.pt").stat().st_mtime_ns == before
    assert checkpoints.saved_step == 3
    assert load_checkpoint(tmp_path / "step_00000003.pt")["videos"] == "videos"
