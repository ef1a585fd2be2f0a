"""A model that open_clip knows by name, for tests of weights."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import open_clip.factory
import pytest

from tests.support.clip_models import small_config


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a model with open_clip by name, so that its weights may come from a file or a tag."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    config = tmp_path / "tgmae-test.json"
    config.write_text(json.dumps({**small_config(), "quick_gelu": True}))
    open_clip.add_model_config(config)
    return "tgmae-test"
