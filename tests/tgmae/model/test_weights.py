"""Weights of another model are refused, naming what differs."""

from __future__ import annotations

import pytest
import torch

from tgmae.model.weights import check_shapes

EXPECTED = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def test_weights_of_the_same_names_and_shapes_pass() -> None:
    check_shapes(EXPECTED, {"b": torch.ones(4), "a": torch.ones(2, 3)}, "file.pt")


def test_names_that_differ_are_listed() -> None:
    message = r"file\.pt holds the weights of a different model: missing \['b'\], not expected \['c'\]"
    with pytest.raises(ValueError, match=message):
        check_shapes(EXPECTED, {"a": torch.zeros(2, 3), "c": torch.zeros(4)}, "file.pt")


def test_both_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"file\.pt .*: a is \[3, 2\] there, \[2, 3\] in this configuration"):
        check_shapes(EXPECTED, {"a": torch.zeros(3, 2), "b": torch.zeros(4)}, "file.pt")
