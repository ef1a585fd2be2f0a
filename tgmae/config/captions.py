"""Which captions of a manifest clips may draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dali_pipelines.types import Caption


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """Sources of captions, and how many of each a video keeps."""

    sources: tuple[str, ...] = ()  # Draw captions of these sources, such as blip2,llm; none given means all.
    # Captions that a video keeps of each source, evenly spaced: a number, or all. 1 of 3 is that of the centre frame.
    per_video: str = "all"

    def __post_init__(self) -> None:
        names = [name.strip() for given in self.sources for name in given.split(",")]
        object.__setattr__(self, "sources", tuple(name for name in names if name))
        if self.per_video != "all" and not (self.per_video.isdecimal() and int(self.per_video) >= 1):
            raise ValueError(f"--captions.per-video must be a number from 1 on, or all, got {self.per_video}")

    def accepts(self, caption: Caption) -> bool:
        """Return whether clips may draw captions of this source."""
        return not self.sources or caption.source in self.sources

    def choose(self, captions: Sequence[Caption]) -> list[int]:
        """Return the numbers of the captions that a clip may draw, ascending.

        Where none is of a wanted source, all may be drawn: what then stands there was put there for want of one
        (`tgmae.captions.policy`).
        """
        by_source: dict[str, list[int]] = {}
        for number, caption in enumerate(captions):
            if self.accepts(caption):
                by_source.setdefault(caption.source, []).append(number)
        if not by_source:
            return list(range(len(captions)))
        if self.per_video == "all":
            return sorted(number for numbers in by_source.values() for number in numbers)
        return sorted(
            numbers[place] for numbers in by_source.values() for place in spread(len(numbers), int(self.per_video))
        )


def spread(length: int, count: int) -> list[int]:
    """Return the middles of `count` equal parts of 0 … length − 1, ascending: every number where there are fewer."""
    return sorted({(2 * part + 1) * length // (2 * count) for part in range(count)})
