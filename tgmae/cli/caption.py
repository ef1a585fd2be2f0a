"""tgmae-caption generate | oracle | human | llm | show: give videos captions, and look at them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from dali_pipelines.workers.processes import count_cores
from tgmae.captions.generate.config import SOURCE_NAME, BackendConfig
from tgmae.cli.parser.subcommands import Command, SharedCommand, name_some, run_subcommand

if TYPE_CHECKING:  # --help does without pyarrow, torch and transformers
    from rich.table import Table

    from dali_pipelines.types import Caption
    from dali_pipelines.workers.team import Team
    from tgmae.captions.generate.asking import Captioner
    from tgmae.captions.generate.job import JobResult
    from tgmae.captions.generate.transformers_backend import TransformersModel
    from tgmae.data.manifest import Manifest


@dataclass(frozen=True)
class Generate(SharedCommand):
    """Caption keyframes with a model, as the paper does with BLIP-2: three of each video, one caption each.

    Captions, their frames, prompt, model and revision go into MANIFEST.captions-SOURCE.parquet, and from there into the
    manifest. After an interruption the same command continues. Under torchrun the processes share the work.
    """

    EXAMPLES: ClassVar = (
        "tgmae-caption generate data/mine.parquet --model Salesforce/blip2-opt-2.7b --source blip2  "
        "# Caption three keyframes of each video, as the paper does.",
        "tgmae-caption generate data/mine.parquet --model Qwen/Qwen2.5-VL-7B-Instruct --backend openai "
        "--url http://localhost:8000/v1 --captions-per video  # Ask a server for one caption of all three frames.",
    )
    COMMON: ClassVar = ("model", "source", "prompt", "frames", "captions-per", "backend", "url", "batch", "device")

    # Parquet file made by `tgmae-data index`.
    manifest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST")]
    ask: Annotated[BackendConfig, tyro.conf.arg(name="")]
    prompt: str | None = None  # What the model is told. Default: what its kind wants, such as "Describe this image …".
    frames: int = 3  # Uniformly spaced keyframes of each video; 1 is the centre frame.
    captions_per: Literal["frame", "video"] = "frame"  # One caption of each frame, or one of all frames together.
    max_side: int = 768  # Larger frames are made smaller while they are decoded: pixels of the longer side.
    source: str | None = None  # Name of the captions' source. Default: the last part of the model's name.
    out: Path | None = None  # Manifest to write. Default: MANIFEST itself.
    root: Path | None = None  # Folder of the videos, where it is not the one that the manifest names.
    split: str = ""  # Rows of the manifest to caption; "" takes every row.
    workers: int = field(default_factory=count_cores)  # Processes that decode.

    def share(self, team: Team) -> None:
        from tgmae.captions.adding import check_out
        from tgmae.captions.generate.sidecar import Sidecar
        from tgmae.captions.generate.videos import Keyframes, caption_videos, captions_of
        from tgmae.data.manifest import open_manifest

        source = self.ask.name_source(self.source)
        with team.main_first():
            if self.workers < 1:
                raise ValueError(f"--workers must be at least 1, got {self.workers}")
            keyframes = Keyframes(count=self.frames, per=self.captions_per, max_side=self.max_side)
            check_out(self.manifest, self.out)
            manifest = open_manifest(self.manifest, self.root).select_split(self.split)
            revision, prompt, load = _choose_model(self.ask, self.prompt, self.captions_per == "video")
        key: dict[str, str | int] = {
            **_key(self.ask, revision), "prompt": prompt, "frames": self.frames, "captions_per": self.captions_per,
            "max_side": self.max_side,
        }  # fmt: skip
        sidecar = Sidecar.beside(self.manifest, source, key)
        result = caption_videos(manifest, sidecar, keyframes, prompt, load, self.workers, team)
        if result is None:
            return
        name_some("in part only:", result.broken)
        name_some("no caption:", result.failed)
        _add(self.manifest, self.out, manifest, captions_of(manifest, result, source), source, result, sidecar.path)


@dataclass(frozen=True)
class Oracle(Command):
    """Use the label of each video as its caption: the oracle of table 6b."""

    EXAMPLES: ClassVar = (
        "tgmae-caption oracle data/mine.parquet  # Make “brush hair” the caption of class brush_hair.",
        "tgmae-caption oracle data/mine.parquet --out data/mine-oracle.parquet  # Leave the manifest as it is.",
    )

    # Parquet file made by `tgmae-data index`.
    manifest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST")]
    out: Path | None = None  # Manifest to write. Default: MANIFEST itself.

    def run(self) -> None:
        from tgmae.captions.adding import check_out
        from tgmae.captions.oracle import SOURCE, caption_by_label
        from tgmae.data.manifest import read_manifest

        check_out(self.manifest, self.out)
        manifest = read_manifest(self.manifest)
        _add(self.manifest, self.out, manifest, caption_by_label(manifest), SOURCE)


@dataclass(frozen=True)
class Human(Command):
    """Add captions that people wrote, from a CSV or JSON file that names videos.

    A CSV has a first line that names its columns; fields are separated by commas, semicolons or tabs. JSON is a list of
    objects, or one object from paths to captions. Names are paths, with or without suffix, or names of files.
    """

    EXAMPLES: ClassVar = (
        "tgmae-caption human data/mine.parquet captions.csv  # Read the columns path, caption, caption_2 and so on.",
        "tgmae-caption human data/ssv2.parquet train.json --path-column id --caption-column label  "
        "# The sentences of Something-Something.",
    )

    # Parquet file made by `tgmae-data index`.
    manifest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST")]
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]  # Captions: .csv, .tsv, .json or .jsonl.
    path_column: str = "path"  # Column, or field, that names videos.
    # Column, or field, of the captions. Default: all that are called caption or captions, alone or with a number.
    caption_column: str | None = None
    under: str = ""  # Folder of the videos that the names are relative to, below the manifest's.
    source: str = "human"  # Name of the captions' source.
    out: Path | None = None  # Manifest to write. Default: MANIFEST itself.

    def run(self) -> None:
        from tgmae.captions.adding import check_out
        from tgmae.captions.human import read_human
        from tgmae.data.manifest import read_manifest

        if not SOURCE_NAME.fullmatch(self.source):
            raise ValueError(f"--source must be made of letters, digits and . + - _, got {self.source!r}")
        check_out(self.manifest, self.out)
        manifest = read_manifest(self.manifest)
        matched = read_human(self.file, manifest, self.source, self.path_column, self.caption_column, self.under)
        if note := matched.describe_unknown(self.file):
            print(note, file=sys.stderr)
        _add(self.manifest, self.out, manifest, matched.captions, self.source)


@dataclass(frozen=True)
class Llm(Command):
    """Have a language model describe each class, and use that as the captions of its videos (table 6a).

    The paper's three questions are asked of every label. Answers go into MANIFEST.captions-SOURCE.parquet, and no
    question is asked twice.
    """

    EXAMPLES: ClassVar = (
        "tgmae-caption llm data/mine.parquet --model gpt-4o-mini --backend openai --url https://api.openai.com/v1  "
        "# The key is read from OPENAI_API_KEY.",
        "tgmae-caption llm data/mine.parquet --model Qwen/Qwen2.5-7B-Instruct --answers 3  "
        "# Three answers to each question, by a model on this machine.",
    )
    COMMON: ClassVar = ("model", "answers", "templates", "source", "backend", "url", "max-tokens")

    # Parquet file made by `tgmae-data index`.
    manifest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST")]
    ask: Annotated[BackendConfig, tyro.conf.arg(name="")]
    answers: int = 1  # Answers to each question: the likeliest one, or several drawn at random.
    templates: Path | None = None  # File with a question on each line, {} for the class. Default: the paper's three.
    seed: int = 0  # Random seed of several answers.
    source: str = "llm"  # Name of the captions' source.
    out: Path | None = None  # Manifest to write. Default: MANIFEST itself.

    def run(self) -> None:
        from tgmae.captions.adding import check_out
        from tgmae.captions.generate.sidecar import Sidecar
        from tgmae.captions.llm import captions_by_class, describe_classes, read_templates
        from tgmae.data.manifest import read_manifest

        if self.answers < 1:
            raise ValueError(f"--answers must be at least 1, got {self.answers}")
        source = self.ask.name_source(self.source)
        templates = read_templates(self.templates)
        check_out(self.manifest, self.out)
        manifest = read_manifest(self.manifest)
        revision, _, load = _choose_model(self.ask, "", False, needs_images=False)
        asked: dict[str, str | int] = {"templates": "\n".join(templates), "answers": self.answers, "seed": self.seed}
        sidecar = Sidecar.beside(self.manifest, source, {**_key(self.ask, revision), **asked})
        result = describe_classes(manifest, sidecar, templates, self.answers, self.seed, load)
        name_some("no answer about class", result.failed)
        _add(self.manifest, self.out, manifest, captions_by_class(manifest, result, source), source, result,
             sidecar.path)  # fmt: skip


@dataclass(frozen=True)
class Show(Command):
    """Say how many captions there are of each source, how long, and how alike; draw frames with their captions."""

    EXAMPLES: ClassVar = (
        "tgmae-caption show data/mine.parquet  # Draw data/mine.captions.png.",
        "tgmae-caption show data/mine.parquet --count 24 --seed 1  # Draw more videos, and others.",
    )

    # Parquet file made by `tgmae-data index`.
    manifest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST")]
    out: Path | None = None  # PNG file to write. Default: the manifest's name with .captions.png.
    root: Path | None = None  # Folder of the videos, where it is not the one that the manifest names.
    count: int = 8  # Videos on the sheet.
    seed: int = 0  # Random seed for the choice of videos.

    def run(self) -> None:
        from rich.console import Console

        from tgmae.data.manifest import open_manifest
        from tgmae.pictures.caption_sheet import draw_captions

        manifest = open_manifest(self.manifest, self.root)
        Console().print(_summary(manifest))
        out = self.out or self.manifest.with_suffix(".captions.png")
        name_some("could not be read:", draw_captions(manifest, out, self.count, self.seed))
        print(f"frames with their captions: {out}")


def _choose_model(
    ask: BackendConfig, prompt: str | None, per_video: bool, needs_images: bool = True
) -> tuple[str, str, Callable[[], Captioner]]:
    """Return the model's revision, the prompt for frames, and what loads it. Only the configuration is read here."""
    if ask.backend == "openai":
        from tgmae.captions.generate.asking import ASK_FRAME, ASK_VIDEO
        from tgmae.captions.generate.openai_backend import OpenAICaptioner

        told = prompt if prompt is not None else ASK_VIDEO if per_video else ASK_FRAME
        return "", told, lambda: OpenAICaptioner(ask)
    from tgmae.captions.generate.transformers_backend import TransformersModel

    model = TransformersModel(ask.model, needs_images)
    return model.revision, model.choose_prompt(prompt, per_video), lambda: _load(model, ask)


def _load(model: TransformersModel, ask: BackendConfig) -> Captioner:
    from tgmae.training.parallel import choose_device

    return model.load(choose_device(ask.device), ask.max_tokens, ask.batch)


def _key(ask: BackendConfig, revision: str) -> dict[str, str | int]:
    """Return what captions depend on besides videos and questions."""
    return {"model": ask.model, "revision": revision, "backend": ask.backend, "max_tokens": ask.max_tokens}


def _add(
    path: Path, out: Path | None, manifest: Manifest, captions: Sequence[Sequence[Caption] | None], source: str,
    result: JobResult | None = None, sidecar: Path | None = None,
) -> None:  # fmt: skip
    """Write captions into a manifest and say what has become of it. Raises ValueError where there is none."""
    from tgmae.captions.adding import add_captions

    if result is not None and not result.records:
        reason = f": {result.failed[0].reason}" if result.failed else ""
        raise ValueError(f"none of {len(captions)} videos has a caption; {path} stays as it is{reason}")
    added = add_captions(path, out, manifest, captions, source)
    said = added.describe(out or path, source)
    if result is not None:
        said += f"; {result.num_new} answered, {len(result.records) - result.num_new} known before"
        said += f", {len(result.failed)} failed" + f", {len(result.broken)} in part" * bool(result.broken)
        flags = result.describe_flags()
        said += f"; {flags}" * bool(flags) + f"; {result.seconds:.1f} s"
    print(said)
    if sidecar is not None:
        print(f"prompts, models and frames: {sidecar}")
    print(f"train on them alone with: --captions.sources {source}", file=sys.stderr)


def _summary(manifest: Manifest) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from tgmae.captions.summary import CLIP_TOKENS, summarise
    from tgmae.data.manifest import count_videos

    bare = sum(not row for row in manifest.captions())
    title = f"captions of {count_videos(len(manifest))}" + f"; {bare} have none" * bool(bare)
    table = Table(title=title, box=SIMPLE_HEAD)
    for name in ("source", "captions", "videos", "words (median)", "repeated", f"over {CLIP_TOKENS} tokens", "suspect"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for found in summarise(manifest):
        low, middle, high = found.words

        def share(count: int, whole: int = found.num_captions) -> str:
            return f"{count} ({count / whole:.0%})" if count else "0"

        table.add_row(
            escape(found.source or "(none)"), f"{found.num_captions}", share(found.num_videos, len(manifest)),
            f"{low}–{high} ({middle:g})", share(found.num_repeated), share(found.num_too_long),
            share(found.num_flagged),
        )  # fmt: skip
    return table


COMMANDS = {"generate": Generate, "oracle": Oracle, "human": Human, "llm": Llm, "show": Show}


def main() -> None:
    run_subcommand(
        "tgmae-caption",
        "Give videos captions: from models, labels, people. A manifest holds captions of many sources.",
        [Generate.EXAMPLES[0], Show.EXAMPLES[0]],
        COMMANDS,
    )


if __name__ == "__main__":
    main()
