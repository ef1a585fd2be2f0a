"""The demo's CLIP is the default for the demo's data alone, and warns of any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from dali_pipelines.types import Caption
from engines.config import SHAPES_CLIP, CLIPConfig
from tests.support.videos import make_video
from tgmae.captions.clip_choice import advise_clip, default_clip, shows_shapes
from tgmae.cli.check import Check
from tgmae.data.manifest import Manifest, read_manifest, write_manifest


def manifest_of(folder: Path, *sources: str) -> Manifest:
    videos = [
        make_video(path=f"{row}.mp4", captions=(Caption("a red ball", source),)) for row, source in enumerate(sources)
    ]
    write_manifest(folder / "manifest.parquet", videos, folder)
    return read_manifest(folder / "manifest.parquet")


def test_shapes_are_known_by_the_source_of_their_captions_or_by_their_boxes(shapes: Path, tmp_path: Path) -> None:
    assert shows_shapes(read_manifest(shapes))
    assert shows_shapes(manifest_of(tmp_path, "shapes", "shapes"))  # a copy, compacted elsewhere
    assert not shows_shapes(manifest_of(tmp_path, "shapes", "csv"))
    assert not shows_shapes(manifest_of(tmp_path, "", ""))
    (tmp_path / "boxes.parquet").touch()  # data sets made before captions had sources
    assert shows_shapes(manifest_of(tmp_path, "", ""))


def test_only_the_demos_clip_warns_and_only_elsewhere(shapes: Path, tmp_path: Path) -> None:
    real = manifest_of(tmp_path, "ssv2")
    assert "--clip.model shapes knows nothing else" in advise_clip(True, real)
    assert advise_clip(True, read_manifest(shapes)) == advise_clip(False, real) == ""
    assert CLIPConfig(model="shapes").is_demos
    assert CLIPConfig(model=str(SHAPES_CLIP)).is_demos
    assert not CLIPConfig().is_demos


def test_a_command_without_a_preset_takes_the_clip_of_its_videos(shapes: Path, tmp_path: Path) -> None:
    manifest_of(tmp_path, "ssv2")
    other = str(tmp_path / "manifest.parquet")
    assert default_clip(None) == default_clip(tmp_path / "none.parquet") == CLIPConfig().model
    assert default_clip(shapes) == "shapes"
    for arguments, model in (
        ([], CLIPConfig().model), (["--manifest", str(shapes)], "shapes"), ([f"--manifest={shapes}"], "shapes"),
        (["--manifest", other], CLIPConfig().model),
    ):  # fmt: skip
        command = Check.make_default(arguments)
        assert isinstance(command, Check)
        assert command.clip.model == model


@pytest.mark.parametrize("preset", ["ssv2", "k400", "ucf101"])
def test_presets_of_real_videos_name_a_real_clip(preset: str) -> None:
    from tgmae.presets import PRESETS

    assert not PRESETS[preset].clip.is_demos
