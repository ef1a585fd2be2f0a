"""Ask a model about many videos or classes. Every answer is kept as soon as it is there, and no question is put twice.

Several processes share the work as they share indexing (`dali_pipelines.workers.team`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dali_pipelines.types import SkippedVideo
from dali_pipelines.workers.team import Team
from engines.files import claim_file
from engines.progress import progress_bar
from tgmae.captions.generate.asking import Captioner, Question, Reply
from tgmae.captions.generate.sidecar import Generated, Record, Sidecar
from tgmae.captions.quality import drop_unfinished, find_flag


class Asked(NamedTuple):
    """What came of one question: a record or the reason why there is none, and why frames were missing."""

    place: int
    record: Record | None
    reason: str


# Asks about the given places and yields each of them in any order.
Ask = Callable[[list[int]], Iterator[Asked]]


@dataclass(frozen=True)
class JobResult:
    """What a job has made, and what it has not.

    records  of all names that were asked for and could be answered, in their order
    failed   what could not be read or answered        broken  what could be read in part only
    """

    records: list[Record]
    num_new: int
    failed: list[SkippedVideo]
    broken: list[SkippedVideo]
    seconds: float

    @property
    def flags(self) -> Counter[str]:
        """Number of captions by what is wrong with them; "" for nothing."""
        return Counter(caption.flag for record in self.records for caption in record.captions)

    def describe_flags(self) -> str:
        """Return "2 empty, 1 repetitive", or "" where nothing is wrong."""
        return ", ".join(f"{count} {flag}" for flag, count in sorted(self.flags.items()) if flag)


def run_job(
    sidecar: Sidecar, names: Sequence[str], digests: Sequence[str], ask: Ask, team: Team, unit: str
) -> JobResult | None:
    """Ask about every name that the sidecar does not know, and write the sidecar. Only the main process gets a result.

    names, digests   of what is asked about, in the main process; others pass them too and do their share

    Raises ValueError where the sidecar holds captions made in another way, InUseError where another process writes it.
    """
    if not team.is_main:
        _ask_share(sidecar, [], names, ask, team, unit)
        return None
    started = time.perf_counter()
    with claim_file(sidecar.path):
        known = sidecar.read()
        places = [
            place
            for place, (name, digest) in enumerate(zip(names, digests, strict=True))
            if name not in known or known[name].digest != digest
        ]
        asked = _ask_share(sidecar, places, names, ask, team, unit)
        asked.sort(key=lambda answer: answer.place)
        for answer in asked:
            known.pop(names[answer.place], None)  # of a file that was replaced since
        known |= {answer.record.name: answer.record for answer in asked if answer.record}
        wanted = set(names)
        records = [known[name] for name in dict.fromkeys(names) if name in known]
        # Those of another split, or of a manifest that once had more videos, are kept.
        if asked or sidecar.journal.exists():
            sidecar.write([*records, *(record for name, record in known.items() if name not in wanted)])
    told = {
        has_record: [
            SkippedVideo(row=answer.place, path=names[answer.place], reason=answer.reason)
            for answer in asked
            if answer.reason and (answer.record is not None) == has_record
        ]
        for has_record in (False, True)
    }
    num_new = sum(answer.record is not None for answer in asked)
    return JobResult(records, num_new, told[False], told[True], time.perf_counter() - started)


def _ask_share(
    sidecar: Sidecar, places: list[int], names: Sequence[str], ask: Ask, team: Team, unit: str
) -> list[Asked]:
    share = team.divide(places)
    asked: list[Asked] = []
    if not share:
        return team.collect(asked)
    with (
        sidecar.open_journal(team.rank) as note,
        progress_bar(total=len(share), desc=team.describe("captioning"), unit=unit, disable=not team.is_main) as bar,
    ):
        for answer in ask(share):
            if answer.record is not None:
                note(answer.record)
            asked.append(answer)
            bar.update()
    return team.collect(asked)


def put_questions(
    captioner: Captioner, questions: Iterator[Question | Asked], names: Sequence[str], digests: Sequence[str]
) -> Iterator[Asked]:
    """Put questions to a model, and yield what comes of each. What could not be asked is passed on as it is."""
    unasked: list[Asked] = []

    def only_questions() -> Iterator[Question]:
        for question in questions:
            if isinstance(question, Question):
                yield question
            else:
                unasked.append(question)

    for question, replies in captioner.answer(only_questions()):
        yield from unasked
        unasked.clear()
        if isinstance(replies, str):
            yield Asked(question.place, None, replies)
        else:
            name, digest = names[question.place], digests[question.place]
            yield Asked(question.place, _record(name, digest, question, replies), question.broken)
    yield from unasked


def _record(name: str, digest: str, question: Question, replies: Sequence[Reply]) -> Record:
    made = []
    for prompt, reply in zip(question.prompts, replies, strict=True):
        text = " ".join(reply.text.split())
        flag = find_flag(text, reply.is_cut)
        text = drop_unfinished(text) if flag == "cut" else text
        made.append(Generated(text=text, flag=flag, prompt=prompt.text, frames=prompt.numbers))
    return Record(name=name, digest=digest, captions=tuple(made))
