"""Add the captions of one source to a manifest. Those of other sources stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dali_pipelines.types import Caption
from engines.files import claim_file
from tgmae.data.manifest import Manifest, count_videos, read_manifest, write_manifest


@dataclass(frozen=True)
class Added:
    """What a manifest has gained.

    num_captions  of the source, now          num_videos  that have one
    num_bare      videos without any caption  num_replaced  captions of the source that were there before
    """

    num_captions: int
    num_videos: int
    num_bare: int
    num_replaced: int

    def describe(self, out: Path, source: str) -> str:
        """Summarise the result in one line."""
        replaced = f", in place of {self.num_replaced}" * bool(self.num_replaced)
        bare = f"; {count_videos(self.num_bare)} without any caption" * bool(self.num_bare)
        captions = f"{self.num_captions} caption{'s' * (self.num_captions != 1)}"
        return f"{out}: {captions} of source {source} for {count_videos(self.num_videos)}{replaced}{bare}"


def check_out(path: Path, out: Path | None) -> None:
    """Raise ValueError where --out is another manifest that holds captions which would be lost."""
    if out is None or out.resolve() == path.resolve() or not out.exists():
        return
    found = {caption.source for row in read_manifest(out).captions() for caption in row}
    lost = found - {caption.source for row in read_manifest(path).captions() for caption in row}
    if lost:
        raise ValueError(
            f"{out} holds captions of {', '.join(sorted(lost))}, which {path} has not, and would lose them; add to it "
            f"by giving {out} in place of {path}"
        )


def add_captions(
    path: Path, out: Path | None, manifest: Manifest, captions: Sequence[Sequence[Caption] | None],
    source: str,
) -> Added:  # fmt: skip
    """Write the manifest with the captions of a source in place of those that it has of that source.

    path      the manifest, which is read again: another command may have added captions of its own meanwhile
    out       where to write it, if not to `path`
    manifest  rows that `captions` belong to. Other rows of the file keep what they have, and so do rows with None
    """
    target = out or path
    target.parent.mkdir(parents=True, exist_ok=True)
    pairs = zip(manifest.names(), captions, strict=True)
    new: Mapping[str, Sequence[Caption]] = {name: listed for name, listed in pairs if listed is not None}
    with claim_file(target):
        whole = read_manifest(path, manifest.root)
        videos, num_replaced = [], 0
        for video in whole.rows():
            if video.name in new:
                others = [caption for caption in video.captions if caption.source != source]
                num_replaced += len(video.captions) - len(others)
                video = replace(video, captions=(*others, *new[video.name]))
            videos.append(video)
        write_manifest(target, videos, manifest.root)
    counts = [sum(caption.source == source for caption in video.captions) for video in videos]
    return Added(sum(counts), sum(map(bool, counts)), sum(not video.captions for video in videos), num_replaced)
