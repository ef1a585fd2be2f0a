"""Captions that say nothing: empty ones, and those in which a model repeats itself."""

from __future__ import annotations

from typing import Literal

Flag = Literal["", "empty", "repetitive", "cut"]

_REPEATS = 3  # times in a row that a phrase may stand
_WORD_REPEATS = 4  # the same for a single word: "no, no, no" is speech
_FEW_WORDS = 3  # where there are fewer, and a long text, the script does without spaces


def find_flag(text: str, is_cut: bool = False) -> Flag:
    """Say what is wrong with a caption: nothing in it, a phrase again and again, or cut off by the limit of tokens."""
    if not any(letter.isalnum() for letter in text):
        return "empty"
    words = text.lower().split()
    if _repeats(words) or (len(words) < _FEW_WORDS and _repeats(list(text.lower()), 2)):
        return "repetitive"
    return "cut" if is_cut else ""


def _repeats(words: list[str], shortest: int = 1) -> bool:
    """Return whether some words in a row stand there three times or more, a single one four times or more."""
    for period in range(shortest, len(words) // _REPEATS + 1):
        wanted = period * ((_WORD_REPEATS if period == 1 else _REPEATS) - 1)
        run = 0
        for place in range(period, len(words)):
            run = run + 1 if words[place] == words[place - period] else 0
            if run >= wanted:
                return True
    return False


def drop_unfinished(text: str) -> str:
    """Return a text that was cut off without its last, unfinished sentence, where there is a finished one."""
    last = max(text.rfind(mark) for mark in (". ", "! ", "? ", "。", "\n"))
    return text[: last + 1].strip() if last > 0 else text
