"""What --mask.scorer auto finds beside a manifest, what it does without, and that a resumed run keeps what it had."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines.config import CLIPConfig, TowerSpec
from tests.support.clip_models import save_small_clip
from tests.support.runs import losses, tiny
from tgmae.cli.data import main
from tgmae.config.masks import MaskConfig
from tgmae.config.run import InputConfig, TrainConfig
from tgmae.config.saved import read_config
from tgmae.data.manifest import read_manifest, write_manifest
from tgmae.data.mixing.joined import open_data_sets
from tgmae.masks.choosing import choose_scorer, motion_folder, name_command, scores_folder
from tgmae.masks.maps.build_motion import build_motion
from tgmae.masks.maps.build_scores import build_scores
from tgmae.presets import PRESETS
from tgmae.train import train

CELLS, PATCH = 4, 16


@pytest.fixture
def manifest(shapes: Path, tmp_path: Path) -> Path:
    """Eight clips of the demo, in a folder of their own that holds no maps."""
    whole = read_manifest(shapes)
    path = tmp_path / "set" / "manifest.parquet"
    path.parent.mkdir()
    write_manifest(path, [whole[row] for row in range(8)], whole.root)
    return path


def config(manifest: Path, cache_dir: Path, **mask: object) -> TrainConfig:
    plain = tiny(manifest, manifest.parent / "run", max_steps=2, clip=CLIPConfig(model="shapes", cache_dir=cache_dir))
    model = replace(plain.model, image_size=CELLS * PATCH, patch_size=PATCH)
    return replace(plain, model=model, mask=MaskConfig(**mask))  # type: ignore[arg-type]


def make_maps(manifest: Path, out: Path, cache_dir: Path, cells: int = CELLS) -> Path:
    clip = CLIPConfig(model="shapes", cache_dir=cache_dir)
    build_scores(
        read_manifest(manifest), out, clip, TowerSpec(kind="dense"), cells=cells, patch_size=PATCH, every=20,
        device=torch.device("cpu"), num_workers=0,
    )  # fmt: skip
    return out


def test_without_maps_a_tiny_clip_scores_patches(manifest: Path, cache_dir: Path, tmp_path: Path) -> None:
    auto = config(manifest, cache_dir)
    assert auto.mask.scorer == "auto" == PRESETS["demo"].mask.scorer == PRESETS["ssv2"].mask.scorer
    chosen, note = choose_scorer(auto, read_manifest(manifest))
    assert (chosen, note) == (replace(auto, mask=replace(auto.mask, scorer="patch")), "")
    save_small_clip(tmp_path / "clip")
    other = replace(auto, clip=CLIPConfig(model=str(tmp_path / "clip")))
    assert choose_scorer(other, read_manifest(manifest))[0].mask.scorer == "patch"


def test_without_maps_a_clip_of_real_size_names_the_command(
    manifest: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the command is one that tgmae-data accepts: it makes the maps that training looks for."""
    large = InputConfig(data=replace(PRESETS["ssv2"].data, manifest=manifest, split="", root=Path("a b")))
    with pytest.raises(ValueError, match=r"^no score maps beside .*manifest\.parquet, .* CLIP ViT-B-32-quickgelu") as e:
        choose_scorer(large, read_manifest(manifest))
    command = str(e.value).partition("make them once with: ")[2]
    assert command == f"tgmae-data scores {manifest} --preset ssv2 --data.root 'a b' --data.split ''"

    mine = replace(large, clip=CLIPConfig(model="ViT-L-14", weights="x"), mask=MaskConfig(no_caption="label"))
    seen = []
    monkeypatch.setattr("tgmae.cli.maps.Scores.share", lambda self, _: seen.append(self))
    monkeypatch.setattr(sys, "argv", shlex.split(name_command(mine)))
    main()
    [asked] = seen
    assert (asked.input.clip, asked.input.data.split, asked.input.data.root) == (mine.clip, "", Path("a b"))
    assert (asked.input.mask.no_caption, asked.input.mask.scorer) == ("label", "patch")
    assert (asked.input.model.image_size, asked.input.model.patch_size) == (224, 16)


@pytest.mark.slow
def test_maps_beside_the_manifest_are_found_if_they_fit(manifest: Path, cache_dir: Path) -> None:
    videos, auto = read_manifest(manifest), config(manifest, cache_dir)
    make_maps(manifest, manifest.parent / "scores-mine", cache_dir)
    chosen, note = choose_scorer(auto, videos)
    assert (chosen.mask.scorer, chosen.mask.scores) == ("cached", manifest.parent / "scores-mine")
    assert note.startswith(f"score maps found beside the manifest: {manifest.parent / 'scores-mine'} (")
    # What the command writes without --out comes first, unless it does not fit.
    usual = make_maps(manifest, scores_folder(manifest, "dense"), cache_dir, cells=2)
    assert choose_scorer(auto, videos)[0].mask.scores == manifest.parent / "scores-mine"
    shutil.rmtree(manifest.parent / "scores-mine")
    chosen, note = choose_scorer(auto, videos)
    assert chosen.mask.scorer == "patch"
    assert "scorer patch, because the maps in" in note
    assert "short side 2 (now 4)" in note
    # A CLIP of real size gets the reason instead, which says what to do.
    with pytest.raises(ValueError, match=r"^no score maps beside .* fit: the maps in .* make") as caught:
        choose_scorer(replace(auto, clip=CLIPConfig()), videos)
    assert str(usual) in str(caught.value)


@pytest.mark.slow
def test_flags_come_first(manifest: Path, cache_dir: Path) -> None:
    videos = read_manifest(manifest)
    make_maps(manifest, scores_folder(manifest, "dense"), cache_dir)
    for mask, scorer in (
        ({"scorer": "patch"}, "patch"),
        ({"scores": Path("mine")}, "cached"),
        ({"student": Path("mine")}, "student"),
        ({"kind": "tube"}, "auto"),  # which has no scorer
    ):
        given = config(manifest, cache_dir, **mask)
        chosen, note = choose_scorer(given, videos, {"kind": "tgm", "scorer": "dense"})
        assert (chosen.mask, note) == (replace(given.mask, scorer=scorer), "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^--mask\.scores and --mask\.student name two scorers"):
        choose_scorer(config(manifest, cache_dir, scores=Path("a"), student=Path("b")), videos)


def test_motion_beside_the_manifest_is_found(manifest: Path, cache_dir: Path, tmp_path: Path) -> None:
    videos = read_manifest(manifest)
    for kind in ("mgm", "mgm_box", "mgmae"):
        with pytest.raises(
            ValueError, match=rf"kind {kind} needs --mask\.motion FOLDER.* tgmae-data motion {manifest}"
        ):
            choose_scorer(config(manifest, cache_dir, kind=kind), videos)
    with pytest.raises(ValueError, match=r"or give --mask\.flow, a RAFT checkpoint"):
        choose_scorer(config(manifest, cache_dir, kind="mgmae"), videos)
    flow = config(manifest, cache_dir, kind="mgmae", flow=tmp_path / "raft.pth")
    assert choose_scorer(flow, videos) == (flow, "")

    build_motion(videos, motion_folder(manifest), num_workers=0)
    chosen, note = choose_scorer(config(manifest, cache_dir, kind="mgm"), videos)
    assert chosen.mask.motion == manifest.parent / "motion"
    assert note == f"motion found beside the manifest: {manifest.parent / 'motion'}"
    given = config(manifest, cache_dir, kind="mgm", motion=Path("mine"))
    assert choose_scorer(given, videos) == (given, "")
    earlier = {"kind": "mgm", "motion": "of before"}
    assert choose_scorer(config(manifest, cache_dir, kind="mgm"), videos, earlier)[0].mask.motion == Path("of before")


@pytest.mark.slow
@pytest.mark.parametrize("begins_with", ["patch", "cached"])
def test_a_resumed_run_keeps_what_it_began_with(
    manifest: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, begins_with: str,
) -> None:  # fmt: skip
    """Whatever lies beside the manifest by then; and auto is not a change of settings. Equal to the explicit scorer."""
    monkeypatch.setattr("tgmae.train._draw", lambda *_: None)
    maps = scores_folder(manifest, "dense")
    if begins_with == "cached":
        make_maps(manifest, maps, cache_dir)
    auto = config(manifest, cache_dir)
    train(replace(auto, max_steps=1))
    said = capsys.readouterr().out
    assert f"scorer {begins_with}" in said
    assert (f"score maps found beside the manifest: {maps}" in said) == (begins_with == "cached")
    saved, _ = read_config(auto.run_dir / "config.json")
    assert (saved.mask.scorer, saved.mask.scores) == (begins_with, maps if begins_with == "cached" else None)

    if begins_with == "patch":
        make_maps(manifest, maps, cache_dir)
    else:  # nearer to the paper's way, but not what the run began with
        shutil.copytree(maps, scores_folder(manifest, "patch"))
    train(auto)
    said = capsys.readouterr().out
    assert "resuming from" in said
    assert "changed since that checkpoint: --max-steps 1 → 2\n" in said
    explicit = replace(auto, run_dir=tmp_path / "explicit", mask=saved.mask)
    train(explicit)
    assert losses(auto.run_dir) == losses(explicit.run_dir)


@pytest.mark.slow
def test_several_data_sets_have_their_own_files(manifest: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Maps of all or of none of them."""
    videos, other = read_manifest(manifest), tmp_path / "other" / "manifest.parquet"
    other.parent.mkdir()
    write_manifest(other, [videos[row] for row in range(3)], videos.root)
    both = config(manifest, cache_dir)
    both = replace(both, data=replace(both.data, manifest=(manifest, other)))
    joined = open_data_sets(both.data)
    first = make_maps(manifest, scores_folder(manifest, "dense"), cache_dir)
    assert choose_scorer(both, joined)[0].mask.scorer == "patch"
    second = make_maps(other, scores_folder(other, "dense"), cache_dir)
    chosen, note = choose_scorer(both, joined)
    assert (chosen.mask.scorer, chosen.mask.scores) == ("cached", (first, second))
    assert len(note.splitlines()) == 2
    saved = {"kind": "tgm", "scorer": "cached", "scores": [str(first), str(second)]}
    assert choose_scorer(both, joined, saved)[0].mask == chosen.mask

    motion = replace(both, mask=MaskConfig(kind="mgm"))
    build_motion(videos, motion_folder(manifest), num_workers=0)
    with pytest.raises(ValueError, match=rf"no motion in {other.parent}"):
        choose_scorer(motion, joined)
    build_motion(read_manifest(other), motion_folder(other), num_workers=0)
    assert choose_scorer(motion, joined)[0].mask.motion == (motion_folder(manifest), motion_folder(other))
