"""Masks check their shapes, and their repr shows shapes instead of contents."""

from __future__ import annotations

import pytest
import torch

from tgmae.model.token_masks import TokenMasks


def tokens(clips: int, count: int) -> torch.Tensor:
    return torch.zeros(clips, count, dtype=torch.int32)


def test_repr_shows_shapes_dtype_and_device() -> None:
    masks = TokenMasks(visible=tokens(8, 632), masked=tokens(8, 936))
    assert repr(masks) == "TokenMasks(visible int32 [8, 632], masked int32 [8, 936], cpu)"
    on_meta = TokenMasks(visible=tokens(1, 2).to("meta"), masked=tokens(1, 3).to("meta"))
    assert str(on_meta) == "TokenMasks(visible int32 [1, 2], masked int32 [1, 3], meta)"


def test_another_dtype_or_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected visible int32 \[B, tokens\], got torch.int64 \[2, 3\]"):
        TokenMasks(visible=tokens(2, 3).long(), masked=tokens(2, 5))
    with pytest.raises(ValueError, match=r"expected masked int32 \[B, tokens\], got torch.int32 \[5\]"):
        TokenMasks(visible=tokens(2, 3), masked=tokens(2, 5)[0])
    with pytest.raises(ValueError, match=r"of one batch size, got \[2, 3\] and \[1, 5\]"):
        TokenMasks(visible=tokens(2, 3), masked=tokens(1, 5))
