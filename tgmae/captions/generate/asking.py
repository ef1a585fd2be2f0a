"""What is asked of a captioning model, and what it answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

# What models that converse are told where no prompt is given.
ASK_FRAME = "Describe this image in one sentence."
ASK_VIDEO = "These are frames of a video, in order. Describe in one sentence what happens in it."


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request for one text.

    frames   uint8 [H, W, 3] each; none for a question about a class
    numbers  of these frames in their file
    seed     of an answer that is drawn at random; None for the likeliest one
    """

    text: str
    frames: tuple[NDArray[np.uint8], ...] = ()
    numbers: tuple[int, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """The prompts about one video or class, which are answered and kept together.

    place   of the video or class among those that are asked about
    broken  why there are fewer frames than were wanted, "" where there are not
    """

    place: int
    prompts: tuple[Prompt, ...]
    broken: str = ""


class Reply(NamedTuple):
    """A text, and whether the limit of tokens cut it off."""

    text: str
    is_cut: bool = False


class Captioner(Protocol):
    """Answers questions in any order. Two exist: transformers on this machine, and a server."""

    def answer(self, questions: Iterator[Question]) -> Iterator[tuple[Question, list[Reply] | str]]:
        """Yield every question with a reply to each of its prompts, or with the reason why there are none.

        Takes no more questions ahead than it works on. Raises ValueError or OSError where nothing can be answered.
        """
        ...
