"""What captions a manifest has: counts per source, lengths, repetitions, and what CLIP cannot read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median

from tgmae.captions.quality import find_flag
from tgmae.data.manifest import Manifest

CLIP_TOKENS = 77  # of CLIP's text encoder, its two marks included


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """The captions of one source."""

    source: str
    num_captions: int
    num_videos: int
    words: tuple[int, float, int]  # fewest, median, most
    num_repeated: int  # captions whose text another caption of the source has, too
    num_too_long: int  # that CLIP cuts off
    num_flagged: int  # in which a phrase stands again and again


def summarise(manifest: Manifest) -> list[SourceSummary]:
    """Return a summary of each source, the one with the most captions first."""
    by_source: dict[str, list[str]] = {}
    videos: Counter[str] = Counter()
    for row in manifest.captions():
        videos.update({caption.source for caption in row})
        for caption in row:
            by_source.setdefault(caption.source, []).append(caption.text)
    lengths = count_tokens({text for texts in by_source.values() for text in texts})
    found = []
    for source, texts in sorted(by_source.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        words = [len(text.split()) for text in texts]
        counts = Counter(texts)
        found.append(
            SourceSummary(
                source=source, num_captions=len(texts), num_videos=videos[source],
                words=(min(words), median(words), max(words)),
                num_repeated=sum(count for count in counts.values() if count > 1),
                num_too_long=sum(lengths[text] > CLIP_TOKENS for text in texts),
                num_flagged=sum(find_flag(text) != "" for text in texts),
            )
        )  # fmt: skip
    return found


def count_tokens(texts: set[str]) -> dict[str, int]:
    """Return the length of each text in CLIP's tokens, its two marks included."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return {text: len(tokenizer.encode(text)) + 2 for text in texts}
