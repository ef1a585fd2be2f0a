"""Captions that say nothing are recognised, and ordinary ones are left alone."""

from __future__ import annotations

import pytest

from tgmae.captions.quality import drop_unfinished, find_flag


@pytest.mark.parametrize("text", ["", "  ", "...", "“”", "-", "\n"])
def test_nothing_is_empty(text: str) -> None:
    assert find_flag(text) == "empty"


@pytest.mark.parametrize(
    "text",
    [
        "a a a a", "blue blue blue blue blue opens", "a man and a man and a man and a",
        "the person in the video is the person in the video is the person in the video is", "一个人一个人一个人一个人",
        "A dog runs. A dog runs. A dog runs.", "hahahahahaha",
    ],
)  # fmt: skip
def test_loops_are_repetitive(text: str) -> None:
    assert find_flag(text) == "repetitive"


@pytest.mark.parametrize(
    "text",
    [
        "a man in a suit and a woman in a dress", "no, no, no", "very very tall", "water into a cup, then water",
        "a person puts a cup on a table and a cup on a chair", "一个人在走路", "cut", "x", "a banana", "Mississippi",
        "one two three one two three four",
    ],
)  # fmt: skip
def test_sentences_are_fine(text: str) -> None:
    assert find_flag(text) == ""


def test_what_the_limit_cut_off_loses_its_last_sentence() -> None:
    assert find_flag("A man runs. He then", is_cut=True) == "cut"
    assert drop_unfinished("A man runs. He then") == "A man runs."
    assert drop_unfinished("A man runs and then") == "A man runs and then"
    assert drop_unfinished("3.5 m") == "3.5 m"
