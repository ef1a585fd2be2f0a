"""The summary of the GPU report: targets, a section for each question, peak memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_report.parts import Outcome, Part
from bench.gpu_report.targets import judge, memory_markdown, peak_memory, targets_markdown
from bench.harness.environment import environment
from bench.harness.report import RESULTS
from bench.harness.tables import markdown
from engines.files import write_atomically

MEMORY = "memory.used, most"  # MiB, as bench/gpu_report/watch.py names it


Record = dict[str, Any]  # what is known of a part, as JSON types


def read_reports(part: Part, device: str, since: float) -> dict[str, dict[str, Any]]:
    """Return the reports that a part wrote after `since`, by name. Reports that were cut off are left out."""
    if not part.reports:
        return {}
    found = {}
    for file in sorted(RESULTS.glob(f"{part.reports}.{device}.json")):
        if file.stat().st_mtime >= since:
            try:
                found[file.name.removesuffix(f".{device}.json")] = json.loads(file.read_text())
            except ValueError:
                print(f"{file.name} is not valid JSON: the part was stopped while writing it")
    return found


def read_records(path: Path) -> list[Record]:
    """Return what an earlier report says of its parts; nothing where there is none, or none that this version reads."""
    try:
        records = json.loads(path.read_text())["parts"]
        return records if all(isinstance(one["reports"], dict) and one["commit"] for one in records) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def make_record(outcome: Outcome, device: str, since: float, about: Mapping[str, Any]) -> Record:
    """Return what a part found, and where: commit, date and driver."""
    part = outcome.part
    return {
        "name": part.name, "question": part.question, "command": " ".join(part.command[1:]), "status": outcome.status,
        "seconds": outcome.seconds, "tail": outcome.tail[-1500:], "utilisation": outcome.utilisation,
        "reports": read_reports(part, device, since), **{key: about[key] for key in ("commit", "date", "driver")},
    }  # fmt: skip


def write_summary(
    outcomes: Sequence[Outcome], device: str, since: float, order: Sequence[str] = ()
) -> tuple[Path, str]:
    """Write gpu.<device>.md and .json; return the path and the targets.

    Parts of an earlier report stay where they were not run again. Each says of which commit and day it is.

    since   seconds since 1970; older reports do not count
    order   names of all parts, as they stand in the report
    """
    RESULTS.mkdir(exist_ok=True)
    path, about = RESULTS / f"gpu.{device}.json", environment()
    records = {record["name"]: record for record in read_records(path)}
    records |= {outcome.part.name: make_record(outcome, device, since, about) for outcome in outcomes}
    places = {name: place for place, name in enumerate(order)}
    sections = sorted(records.values(), key=lambda record: places.get(record["name"], len(places)))
    reports = {name: content for record in sections for name, content in record["reports"].items()}
    targets = judge(reports)
    seen = {one["name"]: one["utilisation"][MEMORY] for one in sections if MEMORY in one["utilisation"]}
    memory = peak_memory(seen, reports)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = [
        f"# {', '.join(about['gpu']) or 'no GPU'}\n",
        f"Driver {about['driver'] or 'not known'}, commit {about['commit']}, {about['date']}, {about['cpu']}, "
        f"Python {about['python']}; {versions}.\n",
        "## Targets\n", (wanted := targets_markdown(targets)),
    ]  # fmt: skip
    if failed := [f"{one['name']} ({one['status']})" for one in sections if one["status"] != "ok"]:
        head.append(f"Parts that failed or were stopped: {', '.join(failed)}.\n")
    if others := [f"{one['name']} ({one['commit']})" for one in sections if one["commit"] != about["commit"]]:
        head.append(f"Parts of other commits: {', '.join(others)}.\n")
    if missing := [name for name in order if name not in records]:
        head.append(f"Parts that have not run: {', '.join(missing)}.\n")
    lines = [line for record in sections for line in describe(record)]
    whole = {**about, "targets": targets, "parts": sections, "peak_memory": memory}
    write_atomically(path, (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode())
    text = path.with_suffix(".md")
    text.write_text("\n".join([*head, *lines, "## Peak memory\n", memory_markdown(memory)]))
    return text, wanted


def describe(record: Record) -> list[str]:
    """Format a part's section: its question, its command, and what it found."""
    lines = [
        f"## {record['question']}\n",
        f"`{record['command']}`: {record['status']}, {record['seconds']:.0f} s, {record['date']}.\n",
    ]
    if record["utilisation"]:
        seen = ", ".join(f"{name} {value:.0f}" for name, value in record["utilisation"].items())
        lines.append(f"nvidia-smi meanwhile: {seen}.\n")
    for report in record["reports"].values():
        lines += [f"- {name}: {value}" for name, value in report.get("headline", {}).items()]
        lines += ["", *(markdown(table) for table in report.get("tables", []))]
    if record["status"] != "ok" or not record["reports"]:
        lines.append(f"```\n{record['tail'].strip()}\n```\n")
    return lines
