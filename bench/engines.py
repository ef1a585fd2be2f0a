"""How fast does each scorer run on each engine and precision, and how much do its masks change?

    python -m bench.engines
    python -m bench.engines data/mine.parquet --student student.safetensors

Takes under a minute on two idle cores, about a minute on a GPU. Writes bench/results/engines.<cpu or GPU>.json.

Rows of speed are clips/s of scores, with frames in memory and passes of the engine's full size. "of limit" is their
arithmetic as a share of the fastest large matrix product in the same rounds (bfloat16 on CUDA, so FP8 may exceed 1),
and "open s" the time until an engine is ready when nothing is cached: export, build, CUDA graph. On CUDA, CLIP is
ViT-B/32 with random weights at 16×224²; on a CPU it is the tiny CLIP at the demo's size. The student in the speed
tables has random weights and is 1024 wide. On CUDA one table has the patch scorer by size of pass, with and without the
CUDA graph. "launch ms" is how long a pass occupies the thread that launches it.

Rows of agreement compare masks at γ .6 with those of torch in float32, with the tiny CLIP on the manifest's clips: the
mean over slots, the 5th percentile, Spearman's rank correlation and the largest difference of a cosine. --student must
have been distilled from the tiny CLIP.

An engine that is not installed, or a precision that does not run here, is left out and named.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from bench.harness.ceilings import MATMUL, matmul_ceiling
from bench.harness.command_line import first_line, run_from_shell
from bench.harness.measure import measure, now, prepare_each
from bench.harness.report import save_report, write_report
from bench.harness.tables import Row, Table
from bench.workloads.inputs import Engine, make_random_clip, make_random_student
from engines.clip_model import CLIPModel, load_clip
from engines.config import CLIPConfig
from engines.patch_similarity import PatchSimilarity, make_patch_similarity
from engines.towers.student import load_student
from tgmae.captions.policy import require_captions
from tgmae.config.data import DEMO_MANIFEST
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.agreement import count_gflop, load_clips, mask_agreement, rank_correlation
from tgmae.masks.scorer import bind_scorer
from tgmae.presets import PRESETS
from tgmae.shapes.demo import provide_demo
from tgmae.training.parallel import choose_device

ScorerName = Literal["patch", "dense", "student"]
Precision = Literal["fp16", "bf16", "fp8", "fp32"]
SCORERS: tuple[ScorerName, ...] = ("patch", "dense", "student")
PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16", "fp8")  # each is compared with fp32
PASS_SIZES = (256, 1024, 2048, 4096, 8192, 16384)  # patches; the smallest pass fits into an L2 cache


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # manifest; the demo's is created if missing
    student: Path | None = None  # student of the tiny CLIP, for agreement
    rounds: int = 3  # measurements of every row, taken in turn
    clips: int = 64  # clips for agreement
    seconds: float = 0.3  # seconds of scoring in a round; at least one call


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: the engine that runs a scorer, and its settings."""

    engine: Engine = "torch"
    precision: Precision = "fp16"
    graph: bool = True
    batch: int | None = None  # patches in a pass

    @property
    def name(self) -> str:
        size = f"{self.batch} patches a pass, " if self.batch else ""
        return f"{size}{self.engine} {self.precision}{'' if self.graph else ', no graph'}"

    def config(self, cache_dir: Path) -> CLIPConfig:
        """Return the configuration. Raises ValueError for a combination that no engine supports."""
        return CLIPConfig(
            model="shapes", engine=self.engine, precision=self.precision, cuda_graph=self.graph, batch=self.batch,
            cache_dir=cache_dir,
        )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Conditions of the speed tables: a CLIP, clips of one size, and a folder for files."""

    clip: CLIPModel
    model: ModelConfig
    frames_per_tubelet: Literal[1, 2]
    folder: Path
    device: torch.device

    def mask(self, scorer: ScorerName) -> MaskConfig:
        return MaskConfig(scorer=scorer, frames_per_tubelet=self.frames_per_tubelet, student=self.student)

    @property
    def student(self) -> Path:
        return self.folder / "student.safetensors"

    @property
    def frames_per_clip(self) -> int:
        return self.model.num_slots * self.frames_per_tubelet


class Opened:
    """An open engine, with two full passes of random frames."""

    def __init__(self, case: Case, scorer: ScorerName, setting: Setting) -> None:
        model, device = setting.model, setting.device
        started = now(device)
        with tempfile.TemporaryDirectory(dir=setting.folder) as cache:  # so that nothing is cached
            config = case.config(Path(cache))
            size, spec = model.image_size, setting.mask(scorer).tower()
            self.similarity: PatchSimilarity = make_patch_similarity(
                setting.clip, config, spec, model.patch_size, size, size, device
            )  # fmt: skip
        self.open_s = now(device) - started
        self.frames_per_clip, self.device = setting.frames_per_clip, device
        one = torch.zeros(1, size, size, 3, dtype=torch.uint8)
        count = 2 * self.similarity.frames_per_pass(one)
        draw = torch.Generator(device).manual_seed(0)
        shape = (count, size, size, 3)
        self.frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=draw)
        embed = setting.clip.visual.proj.shape[1]
        self.texts = F.normalize(torch.randn(count, 1, embed, device=device, generator=draw), dim=-1)
        self.launch_ms: list[float] = []
        self.score()

    def score(self) -> Tensor:
        return self.similarity.compare(self.frames, self.texts)

    def clips_per_s(self, seconds: float) -> float:
        """Score for at least `seconds`; return clips/s."""
        started, count = now(self.device), 0
        while not count or time.perf_counter() - started < seconds:
            self.score()
            count += 1
        rate = count * len(self.frames) / self.frames_per_clip / (now(self.device) - started)
        self.launch_ms.append(self._launch_ms())
        return rate

    def _launch_ms(self) -> float:
        frames = self.frames[: len(self.frames) // 2]
        started = now(self.device)
        self.similarity.embed(frames)
        return (time.perf_counter() - started) * 1000


def speed_table(title: str, cases: Sequence[Case], scorer: ScorerName, setting: Setting, options: Options) -> Table:
    """Measure clips/s of each case, and a matrix product in the same rounds."""
    opened, left_out = {}, []
    for name, case in prepare_each({case.name: case for case in cases}, f"opening, {title}"):
        try:
            opened[name] = Opened(case, scorer, setting)
        except (ValueError, RuntimeError, ImportError) as error:  # no such engine; out of memory; no kernel
            left_out.append(f"left out: {name} ({first_line(error)})")
    work: dict[str, Callable[[], float]] = {
        name: partial(one.clips_per_s, options.seconds) for name, one in opened.items()
    }
    work[MATMUL] = partial(matmul_ceiling, setting.device)
    found = measure(work, options.rounds, title)
    limit = median(found.pop(MATMUL))
    gflop = count_gflop(setting.clip, setting.model, setting.mask(scorer))
    rows = []
    for name, values in found.items():
        tflops, one = gflop * median(values) / 1000, opened[name]
        facts: dict[str, float | str] = {
            "GFLOP a clip": gflop, "TFLOP/s": tflops, "of limit": tflops / limit, "a pass": float(one.similarity.batch),
            "open s": one.open_s,
        }  # fmt: skip
        if setting.device.type == "cuda":
            facts["launch ms"] = median(one.launch_ms)
        rows.append(Row(name, values, facts))
    note = "\n".join([f"the fastest matrix product: {limit:.3g} TFLOP/s", *left_out])
    return Table(title, "clips/s", rows, rows[0].name if rows else None, gflop and limit / gflop * 1000, note)


def plan_cases(device: torch.device) -> list[Case]:
    """List the rows of a speed table."""
    if device.type == "cpu":
        return [Case(precision="fp32"), Case(engine="onnxruntime", precision="fp32")]
    half: list[Case] = [Case(engine=engine) for engine in ("onnxruntime", "tensorrt", "tensorrt_rtx")]
    return [
        Case(), Case(graph=False), Case(precision="bf16"), Case(precision="fp8"), Case(precision="fp32"), *half,
    ]  # fmt: skip


def agreement_table(options: Options, manifest: Manifest, folder: Path, device: torch.device) -> Table:
    """Compare the masks of every precision with those of float32, scorer by scorer."""
    demo = PRESETS["demo"]
    seen = InputConfig(model=demo.model, data=demo.data, mask=MaskConfig(kind="tube"))
    batches = load_clips(seen, manifest, options.clips, 16, device)
    clip, k = load_clip(CLIPConfig(model="shapes")), demo.mask.masked_per_slot(demo.model.patches_per_slot)
    cases = [Case(precision=precision) for precision in PRECISIONS]
    cases += [replace(case, precision="fp16") for case in plan_cases(device) if case.engine != "torch"]
    rows, left_out = [], []
    for scorer in SCORERS if options.student else SCORERS[:2]:
        mask = replace(demo.mask, scorer=scorer, student=options.student)

        def score(case: Case, mask: MaskConfig = mask) -> Tensor:
            scorer = bind_scorer(replace(seen, mask=mask, clip=case.config(folder)), manifest, device, clip)
            return torch.cat([scorer(clips).cpu() for clips in batches])

        exact = score(Case(precision="fp32"))
        for case in cases:
            name = f"{scorer}, {case.name}"
            try:
                scores = score(case)
            except (ValueError, RuntimeError, ImportError) as error:
                left_out.append(f"left out: {name} ({first_line(error)})")
                continue
            share = mask_agreement(scores, exact, k)
            facts: dict[str, float | str] = {
                "5th percentile": float(share.flatten().quantile(0.05)),
                "rank corr.": float(rank_correlation(scores, exact).mean()),
                "largest difference": float((scores - exact).abs().max()),
            }
            rows.append(Row(name, [float(share.mean())], facts))
    title = f"masks against torch fp32, the tiny CLIP, {sum(len(clips.requests) for clips in batches)} clips"
    patches = demo.model.patches_per_slot
    note = f"{k} of {patches} patches masked; agreement by chance: {k / patches:.2f}"
    return Table(title, "agreement", rows, note="\n".join([note, *left_out]))


def run(options: Options) -> None:
    device = choose_device("auto")
    on_cuda = device.type == "cuda"
    # Errors in the files must show before a report is overwritten.
    provide_demo(options.manifest)
    manifest, _ = require_captions(read_manifest(options.manifest), "label")
    if options.student:
        tiny = load_clip(CLIPConfig(model="shapes"))
        load_student(options.student, tiny.fingerprint, PRESETS["demo"].model.patch_size)
    tables = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        preset = PRESETS["ssv2" if on_cuda else "demo"]
        clip = make_random_clip() if on_cuda else load_clip(CLIPConfig(model="shapes"))
        setting = Setting(clip, preset.model, preset.mask.frames_per_tubelet, folder, device)
        make_random_student(setting.student, clip, preset.model.patch_size)
        what = "ViT-B/32, 16×224²" if on_cuda else "the tiny CLIP, 8×96²"
        planned = [(f"{scorer}, {what}", plan_cases(device), scorer) for scorer in SCORERS]
        if on_cuda:
            cases = [Case(batch=size, graph=graph) for size in PASS_SIZES for graph in (True, False)]
            planned.append((f"patch by size of pass, {what}", cases, "patch"))
        for title, cases, scorer in planned:
            tables.append(speed_table(title, cases, scorer, setting, options))
            save_report("engines", tables, None, device)
        tables.append(agreement_table(options, manifest, folder, device))
    headline = {}
    for table in tables[:-1]:
        if best := max(table.rows, key=lambda row: median(row.values), default=None):
            share = float(best.facts["of limit"])
            headline[table.title] = f"{best.name}: {median(best.values):.3g} clips/s, {share:.0%} of the limit"
    for row in tables[-1].rows:
        headline[f"agreement, {row.name}"] = f"{row.values[0]:.4f}"
    write_report("engines", tables, headline, device)


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
