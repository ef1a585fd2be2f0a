"""The contact sheet says how many of how many videos it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgmae.data.manifest import read_manifest
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
