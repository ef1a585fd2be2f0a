"""What the contact sheet says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tgmae.data.manifest import read_manifest, write_manifest
from tgmae.pictures.contact_sheet import draw_contact_sheet
from tgmae.pictures.figures import Page


def test_the_sheet_says_how_many_of_how_many(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(Page, "write", lambda page, left, top, text, *_, **__: written.append(text))
    manifest = read_manifest(shapes)
    for count, heading in (
        (2, f"2 of {len(manifest)} videos, chosen at random (seed 3): the middle frame of each"),
        (len(manifest) + 1, f"{len(manifest)} videos: the middle frame of each"),
    ):
        written.clear()
        assert draw_contact_sheet(manifest, tmp_path / "sheet.png", count, seed=3) == []
        assert written[0] == heading
        assert len(written) == 1 + 2 * min(count, len(manifest))


def test_a_long_name_leaves_room_for_size_and_codec(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(shapes)
    name = f"{'v_PlayingBasketball' * 5}.mp4"
    (tmp_path / name).symlink_to(Path(manifest.file(0)).resolve())
    write_manifest(tmp_path / "long.parquet", [replace(manifest[0], path=name)], tmp_path)
    written: list[str] = []
    monkeypatch.setattr(Page, "write", lambda page, left, top, text, *_, **__: written.append(text))
    assert draw_contact_sheet(read_manifest(tmp_path / "long.parquet"), tmp_path / "sheet.png", 1, seed=0) == []
    video = manifest[0]
    assert written[-1].startswith("v_Playing")
    assert written[-1].endswith(f"tball.mp4, {video.width}×{video.height} {video.codec}, {video.length} frames")
