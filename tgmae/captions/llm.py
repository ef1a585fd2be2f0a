"""Captions without vision: a language model describes each class (Fan et al. 2024, table 6a, after CuPL)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dali_pipelines.types import Caption
from dali_pipelines.workers.team import ALONE
from tgmae.captions.generate.asking import Captioner, Prompt, Question
from tgmae.captions.generate.job import Asked, JobResult, put_questions, run_job
from tgmae.captions.generate.sidecar import Sidecar
from tgmae.captions.oracle import read_labels
from tgmae.data.manifest import Manifest

# Fan et al. 2024, table 6a.
TEMPLATES = (
    "Describe the action {}.",
    "What does a person {} look like?",
    "What does the act of {} look like?",
)


def read_templates(path: Path | None) -> tuple[str, ...]:
    """Return the paper's templates, or the lines of a file. Raises ValueError for a line without {}."""
    if path is None:
        return TEMPLATES
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    wrong = [line for line in lines if "{}" not in line]
    if wrong or not lines:
        got = f"got {wrong[0]!r}" if wrong else "it is empty"
        raise ValueError(f"{path} must hold a question on each line, with {{}} where the class stands; {got}")
    return tuple(lines)


def describe_classes(
    manifest: Manifest, sidecar: Sidecar, templates: Sequence[str], answers: int, seed: int,
    load: Callable[[], Captioner],
) -> JobResult:  # fmt: skip
    """Ask about every class that the sidecar does not know: every template, `answers` times.

    A single answer is the likeliest one. Several are drawn at random, by seeds that depend on seed, question and number
    alone. Raises ValueError where no video has a label.
    """
    classes = sorted({label for label in read_labels(manifest) if label})

    def ask(places: list[int]) -> Iterator[Asked]:
        questions = (
            Question(place=place, prompts=tuple(_prompts(classes[place], templates, answers, seed))) for place in places
        )
        return put_questions(load(), questions, classes, [""] * len(classes))

    result = run_job(sidecar, classes, [""] * len(classes), ask, ALONE, "class")
    assert result is not None
    return result


def _prompts(name: str, templates: Sequence[str], answers: int, seed: int) -> Iterator[Prompt]:
    for template in templates:
        text = template.replace("{}", name)
        for number in range(answers):
            drawn = hashlib.sha256(f"{seed} {number} {text}".encode()).digest()
            yield Prompt(text=text, seed=None if answers == 1 else int.from_bytes(drawn[:6], "big"))


def captions_by_class(manifest: Manifest, result: JobResult, source: str) -> list[list[Caption]]:
    """Return what was said about the class of each row; none for a row without a label or an answer."""
    said = {
        record.name: [Caption(made.text, source) for made in record.captions if made.flag != "empty"]
        for record in result.records
    }
    return [said.get(label, []) for label in read_labels(manifest)]
