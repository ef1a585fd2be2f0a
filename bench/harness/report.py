"""What every benchmark prints and writes: medians with their spread, and a JSON that says where they come from.

A benchmark measures its rows in turn, round after round (`measure`), so that a drifting machine hurts all alike, and
hands its tables to `write_report`, which writes bench/results/<name>.<cpu or GPU>.json. `tgmae-viz bench` draws them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from tqdm import tqdm

from bench.harness.chips import short_name

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGES = ("torch", "nvidia-dali-cuda130", "av", "numpy", "xformers", "triton", "tensorrt", "onnxruntime", "decord")
Options = TypeVar("Options")
Case = TypeVar("Case")


@dataclass(frozen=True)
class Row:
    """One thing measured: a value a round in the table's unit, and what else is to be said of it."""

    name: str
    values: Sequence[float]
    facts: Mapping[str, float | str] = field(default_factory=dict)  # further columns


@dataclass(frozen=True)
class Table:
    """Rows that were measured in turn in the same rounds.

    unit         of the rows' values, such as clips/s or ms
    relative_to  the row that all are compared with, as ratios within a round
    limit        in `unit`: what the machine, or the step alone, could reach; drawn as a line
    """

    title: str
    unit: str
    rows: Sequence[Row]
    relative_to: str | None = None
    limit: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: medians, spreads and ratios beside the values they come from."""
        base = next((row.values for row in self.rows if row.name == self.relative_to), None)
        rows = []
        for row in self.rows:
            plain: dict[str, Any] = {"name": row.name, **spread_of(row.values), **row.facts, "values": list(row.values)}
            if base is not None:
                ratios = [a / b for a, b in zip(row.values, base, strict=True)]
                plain["ratio"] = {"to": self.relative_to, **spread_of(ratios)}
            rows.append(plain)
        return {"title": self.title, "unit": self.unit, "limit": self.limit, "note": self.note, "rows": rows}


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    work: Mapping[str, Callable[[], float]],
    rounds: int,
    description: str = "measuring",
    after_round: Callable[[dict[str, list[float]]], object] = lambda found: None,
) -> dict[str, list[float]]:
    """Call each of `work` once a round, in turn; what each returned, a list of `rounds` values a name.

    after_round  is given what there is after every round, to save it
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    with tqdm(total=rounds * len(work), desc=description, unit="run") as bar:
        for _ in range(rounds):
            for name, run in work.items():
                bar.set_postfix_str(name)
                found[name].append(run())
                bar.update()
            after_round(found)
    return found


def prepare_each(cases: Mapping[str, Case], description: str) -> Iterator[tuple[str, Case]]:
    """Each with its name, under a bar that says which is under way."""
    with tqdm(cases.items(), desc=description, leave=False) as bar:
        for name, case in bar:
            bar.set_postfix_str(name)
            yield name, case


def run_from_shell(run: Callable[[Options], None], options: type[Options], description: str | None) -> None:
    """Parse the command line and run; what its user can mend ends with one line and exit status 1."""
    try:
        run(tyro.cli(options, description=description))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"{_command()}: {error}")


def print_table(table: Table) -> None:
    """Median (lowest to highest), the median ratio, and the facts of every row."""
    plain = table.to_dict()
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:  # a borrowed interpreter may lack it
        print(markdown(plain))
        return
    facts = list(dict.fromkeys(name for row in table.rows for name in row.facts))
    shown = RichTable(title=table.title, title_justify="left", caption=table.note or None, caption_justify="left")
    shown.add_column("")
    spread, base = ["lowest to highest"] * _has_spread(plain["rows"]), [f"× {table.relative_to}"]
    for heading in (table.unit, *spread, *(base * bool(table.relative_to)), *facts):
        shown.add_column(heading, justify="right")
    for row, values in zip(table.rows, plain["rows"], strict=True):
        cells = [row.name, _number(values["median"])]
        if spread:
            cells.append(f"{_number(values['low'])} to {_number(values['high'])}")
        if table.relative_to:
            cells.append(f"{values['ratio']['median']:.2f}")
        for name in facts:
            fact = row.facts.get(name, "")
            cells.append(fact if isinstance(fact, str) else _number(fact))
        shown.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


def markdown(table: Mapping[str, Any]) -> str:
    """A table of a report (`Table.to_dict`) for a Markdown page."""
    rows, known = table["rows"], {"name", "median", "low", "high", "values", "ratio"}
    facts = list(dict.fromkeys(name for row in rows for name in row if name not in known))
    base = next((f"× {row['ratio']['to']}" for row in rows if "ratio" in row), None)
    spread = _has_spread(rows)
    headings = ["", table["unit"] + " (lowest to highest)" * spread, *([base] if base else []), *facts]
    lines = [f"**{table['title']}**", "", f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in rows:
        cells = [row["name"], _number(row["median"])]
        if spread:
            cells[1] += f" ({_number(row['low'])} to {_number(row['high'])})"
        if base:
            cells.append(f"{row['ratio']['median']:.2f}")
        cells += [fact if isinstance(fact := row.get(name, ""), str) else _number(fact) for name in facts]
        lines.append(f"| {' | '.join(cells)} |")
    if table["limit"] is not None:
        lines += ["", f"Limit: {_number(table['limit'])} {table['unit']}."]
    return "\n".join([*lines, *(["", table["note"]] if table["note"] else []), ""])


def _has_spread(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether anything was measured more than once."""
    return any(len(row["values"]) > 1 for row in rows)


def _number(value: float) -> str:
    """Three figures, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_report(
    name: str,
    tables: Sequence[Table],
    headline: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    results: Any = None,
) -> Path:
    """Print the tables, write them to bench/results/<name>.<device>.json, and return its path.

    headline  the few figures that answer the benchmark's question        results  anything else worth keeping, as JSON
    """
    for table in tables:
        print_table(table)
    for key, value in (headline or {}).items():
        print(f"{key}: {value}")
    path = save_report(name, tables, headline, device, results)
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def save_report(
    name: str,
    tables: Sequence[Table],
    headline: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    results: Any = None,
) -> Path:
    """`write_report` without a word: after each table, so that a benchmark that runs out of time leaves the others."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.{device_name(device)}.json"
    report = {**environment(), "headline": dict(headline or {}), "tables": [table.to_dict() for table in tables]}
    if results is not None:
        report["results"] = results
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return path


def first_line(error: Exception) -> str:
    """Of what an error says, at most 200 characters; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def source_name(manifest: Path) -> str:
    """The manifest's name, or its folder's where it is called like all others."""
    path = manifest.resolve()
    return path.parent.name if path.stem == "manifest" else path.stem


def device_name(device: torch.device | None) -> str:
    """cpu, or a GPU's name as part of a file name: h200."""
    return "cpu" if device is None or device.type == "cpu" else short_name(torch.cuda.get_device_name(device))


def environment() -> dict[str, Any]:
    """Commit, date, machine and versions."""
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(["python", "-m", _command(), *map(_shorten, sys.argv[1:])]),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "cpu": f"{len(os.sched_getaffinity(0))} × {cpus[0] if cpus else platform.machine()}",
        "gpu": gpus,
        "driver": _driver() if gpus else "",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _command() -> str:
    return f"bench.{Path(sys.argv[0]).stem}"


def _commit() -> str:
    """With "+changes" where other tracked files than results differ; "not known" without git or a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=True)
        return done.stdout.strip()

    try:
        changes = "+changes" * bool(git("status", "--porcelain", "-uno", "--", ":!results"))
        return git("rev-parse", "--short", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return "not known"


def _driver() -> str:
    """As nvidia-smi names it, such as 580.95.05; "" without it. torch knows of the runtime only."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(dict.fromkeys(done.stdout.split()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _shorten(argument: str) -> str:
    """Without the folders of the machine it ran on."""
    return Path(argument).name if Path(argument).is_absolute() else argument
