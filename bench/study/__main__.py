"""What does the contrastive loss add to what an encoder learns, for each kind of mask? The paper's table 2, on shapes.

    python -m bench.study
    python -m bench.study --seeds 0 1 2 3 4     # finished cells are not done again

Takes about an hour on two cores. Stop it at any time; the same command resumes. After every seed it writes
bench/results/study.<cpu or GPU>.json and .md, and draws the losses of its runs, the paper's figure 4, as losses.png in
the folder --work-dir.

A cell pretrains the demo's network on generated clips with tube, mgm or tgm masks, with the contrastive loss or only
observing it, for equal steps. Then every video's central clip becomes one vector, the mean of all tokens of the frozen
encoder, and a logistic regression learns the motion (8 classes) and colour × shape (40 classes; also each alone) from
the videos of split train. What counts is the share of the videos of split val that it classifies correctly: neither
encoder nor regression saw them. Beside the cells stand the same regression on the encoders as they were initialised,
and on raw pixels.

Captions name colour, shape and motion, so the contrastive loss is taught what the probes ask; the paper's captions are
a captioning model's. All clips are drawn from one seed; a cell's seed decides its initial weights, clips and masks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from bench.harness.command_line import run_from_shell
from bench.harness.report import write_report
from bench.harness.tables import markdown
from bench.study.cells import Cell, Kind, Plan, claim_folder, list_cells, make_config, prepare_clips
from bench.study.judge import Judge, compare_captions, measure_hidden
from bench.study.report import make_tables, name_random, read_losses
from engines.files import write_atomically
from tgmae.config.run import TrainConfig
from tgmae.evaluation.features import load_network
from tgmae.model.attention import choose_attention
from tgmae.model.videomae import VideoMAE
from tgmae.pictures.run_losses import draw_run_losses
from tgmae.train import train
from tgmae.training.parallel import choose_device


@dataclass(frozen=True)
class Options:
    seeds: tuple[int, ...] = (0, 1, 2)  # each decides initial weights, clips and masks of six cells
    clips: int = 1600  # videos to draw; every fifth is held out
    epochs: int = 8  # passes over the other videos
    image_size: int = 64  # height and width of a clip; the demo has 96
    work_dir: Path = Path("data/bench/study")  # folder for the videos, the runs and their results


class Study:
    """The cells of one plan in one folder, done and not yet done."""

    def __init__(self, options: Options) -> None:
        self.folder = options.work_dir
        self.plan = Plan(clips=options.clips, epochs=options.epochs, image_size=options.image_size)
        claim_folder(self.folder, self.plan)
        manifest = prepare_clips(self.folder, self.plan)
        self.num_trained = len(manifest.select_split("train"))
        self.judge = Judge(manifest)
        self.found: dict[str, dict[str, Any]] = {}
        self.hidden: dict[str, float] = {}
        config = self.configure(Cell("tube", False, 0))
        self.captions = self.keep("captions", lambda: compare_captions(manifest, config))

    def configure(self, cell: Cell) -> TrainConfig:
        return make_config(self.folder, self.plan, cell, self.num_trained)

    def do_inputs(self) -> None:
        """Judge the pixels of the clips, and what the masks hide of them."""
        configs = {kind: self.configure(Cell(kind, False, 0)) for kind in get_args(Kind)}
        self.found["raw-pixels"] = self.keep("raw-pixels", lambda: self.judge.judge_pixels(configs["tube"]))
        manifest = self.judge.manifest
        self.hidden = self.keep(
            "hidden", lambda: {kind: measure_hidden(manifest, config) for kind, config in configs.items()}
        )

    def do_random(self, seed: int) -> None:
        """Judge the encoder as the cells of a seed begin with it."""
        config = self.configure(Cell("tube", False, seed))
        device = choose_device(config.device)
        torch.manual_seed(seed)
        network = VideoMAE(config.model, choose_attention(config.model.attention, device)).to(device)
        name = name_random(seed)
        self.found[name] = self.keep(name, lambda: self.judge.judge(network, config))

    def do(self, cell: Cell) -> None:
        """Pretrain and judge a cell, from where it was stopped."""
        config = self.configure(cell)

        def pretrain() -> dict[str, Any]:
            if (stopped_by := train(config).signal) != 0:
                raise SystemExit(128 + stopped_by)
            network = load_network(str(config.run_dir / "hf"), config.model, choose_device(config.device))
            return {**asdict(cell), **read_losses(config.run_dir), **self.judge.judge(network, config)}

        self.found[cell.name] = self.keep(cell.name, pretrain)

    def keep(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `make` returned when it was first called under this name, in this folder."""
        path = self.folder / "found" / f"{name}.json"
        if not path.exists():
            found = make()
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept

    def report(self, seeds: tuple[int, ...]) -> None:
        """Write the tables of the seeds that are done."""
        num_held_out = int(self.judge.is_held_out.sum())
        tables = make_tables(self.found, seeds, num_held_out)
        hours = sum(one.get("pretrain_s", 0) + one["probe_s"] for one in self.found.values()) / 3600
        results = {
            **asdict(self.plan), "seeds": seeds, "trained": self.num_trained, "held out": num_held_out,
            "cosine of captions that differ in one word": self.captions,
            "share of the object that masks hide": self.hidden, "found": self.found,
        }  # fmt: skip
        headline = {"hours for training and probes": f"{hours:.2f}"}
        path = write_report("study", tables, headline, choose_device("auto"), results)
        path.with_suffix(".md").write_text("\n".join(markdown(table.to_dict()) for table in tables))
        runs = [self.configure(cell).run_dir for cell in list_cells(seeds)]
        for note in draw_run_losses(runs, self.folder / "losses.png"):
            print(note)


def run(options: Options) -> None:
    if not options.seeds or options.epochs < 1 or options.clips < 10:
        raise ValueError(
            f"expected a seed, an epoch and ten clips at least, got --seeds {' '.join(map(str, options.seeds))} "
            f"--epochs {options.epochs} --clips {options.clips}"
        )
    study, cells = Study(options), list_cells(options.seeds)
    for number, cell in enumerate(cells, 1):
        print(f"cell {number} of {len(cells)}: {cell}", flush=True)
        study.do_random(cell.seed)
        study.do(cell)
        if number == len(cells) or cells[number].seed != cell.seed:
            study.do_inputs()
            study.report(options.seeds[: options.seeds.index(cell.seed) + 1])


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
