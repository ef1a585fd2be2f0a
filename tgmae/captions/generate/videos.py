"""Captions of videos: keyframes are decoded ahead, and a model says what they show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from dali_pipelines.types import Caption
from dali_pipelines.workers.team import Team
from tgmae.captions.generate.asking import Captioner, Prompt, Question
from tgmae.captions.generate.frames import Frames, choose_frames, read_frames
from tgmae.captions.generate.job import Asked, JobResult, put_questions, run_job
from tgmae.captions.generate.sidecar import Sidecar
from tgmae.data.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Keyframes:
    """Which frames of a video are captioned.

    count     uniformly spaced keyframes        per       whether each has a caption, or all of them share one
    max_side  pixels of a frame's longer side above which it is made smaller
    """

    count: int = 3
    per: Literal["frame", "video"] = "frame"
    max_side: int = 768

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--frames must be at least 1, got {self.count}")
        if self.max_side < 16:
            raise ValueError(f"--max-side must be at least 16, got {self.max_side}")


def caption_videos(
    manifest: Manifest,
    sidecar: Sidecar,
    keyframes: Keyframes,
    prompt: str,
    load: Callable[[], Captioner],
    num_workers: int,
    team: Team,
) -> JobResult | None:
    """Caption every video that the sidecar does not know; only the main process gets a result.

    load   loads the model, where there is a video left for this process
    """
    names = manifest.names()
    digests = digest_contents(manifest)

    def ask(rows: list[int]) -> Iterator[Asked]:
        captioner = load()
        read = read_frames(manifest, rows, keyframes.count, keyframes.max_side, num_workers)
        questions = (_make_question(manifest, keyframes, prompt, row, frames, why) for row, frames, why in read)
        return put_questions(captioner, questions, names, digests)

    return run_job(sidecar, names, digests, ask, team, "video")


def digest_contents(manifest: Manifest) -> list[str]:
    """Return what tells the content of each row's file from another: its digest, or its size where that is unknown."""
    columns = (manifest.table.column(name).to_pylist() for name in ("digest", "num_bytes"))
    return [digest or f"{size} bytes" for digest, size in zip(*columns, strict=True)]


def _make_question(
    manifest: Manifest, keyframes: Keyframes, prompt: str, row: int, frames: Frames, reason: str
) -> Question | Asked:
    if not frames:
        return Asked(row, None, reason)
    numbers = choose_frames(manifest[row], keyframes.count)[: len(frames)]
    if keyframes.per == "video":
        return Question(place=row, prompts=(Prompt(text=prompt, frames=tuple(frames), numbers=tuple(numbers)),),
                        broken=reason)  # fmt: skip
    prompts = [
        Prompt(text=prompt, frames=(frame,), numbers=(number,)) for frame, number in zip(frames, numbers, strict=True)
    ]
    return Question(place=row, prompts=tuple(prompts), broken=reason)


def captions_of(manifest: Manifest, result: JobResult, source: str) -> list[list[Caption]]:
    """Return the captions of every row that say something; none for a row without any."""
    records = {record.name: record for record in result.records}
    return [
        [Caption(made.text, source) for made in records[name].captions if made.flag != "empty"]
        if name in records
        else []
        for name in manifest.names()
    ]
