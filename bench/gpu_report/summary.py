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

MEMORY = "memory.used, most"  # MiB, as bench/gpu_report/watch.py names it


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


def write_summary(outcomes: Sequence[Outcome], device: str, since: float) -> tuple[Path, str]:
    """Write gpu.<device>.md and .json; return the path and the targets.

    since   seconds since 1970; older reports do not count
    """
    RESULTS.mkdir(exist_ok=True)
    about, lines, plain = environment(), [], []
    reports: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        found = read_reports(outcome.part, device, since)
        reports |= found
        lines += describe(outcome, list(found.values()))
        plain.append({
            "name": outcome.part.name, "question": outcome.part.question, "status": outcome.status,
            "seconds": outcome.seconds, "utilisation": outcome.utilisation, "reports": list(found.values()),
        })  # fmt: skip
    targets = judge(reports)
    seen = {o.part.name: o.utilisation[MEMORY] for o in outcomes if MEMORY in o.utilisation}
    memory = peak_memory(seen, reports)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = [
        f"# {', '.join(about['gpu']) or 'no GPU'}\n",
        f"Driver {about['driver'] or 'not known'}, commit {about['commit']}, {about['date']}, {about['cpu']}, "
        f"Python {about['python']}; {versions}.\n",
        "## Targets\n", (wanted := targets_markdown(targets)),
    ]  # fmt: skip
    if failed := [f"{o.part.name} ({o.status})" for o in outcomes if o.status != "ok"]:
        head.append(f"Parts that failed or were stopped: {', '.join(failed)}.\n")
    path = RESULTS / f"gpu.{device}.md"
    path.write_text("\n".join([*head, *lines, "## Peak memory\n", memory_markdown(memory)]))
    whole = {**about, "targets": targets, "parts": plain, "peak_memory": memory}
    path.with_suffix(".json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return path, wanted


def describe(outcome: Outcome, reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format a part's section: its question, its command, and what it found."""
    lines = [
        f"## {outcome.part.question}\n",
        f"`{' '.join(outcome.part.command[1:])}`: {outcome.status}, {outcome.seconds:.0f} s.\n",
    ]
    if outcome.utilisation:
        seen = ", ".join(f"{name} {value:.0f}" for name, value in outcome.utilisation.items())
        lines.append(f"nvidia-smi meanwhile: {seen}.\n")
    for report in reports:
        lines += [f"- {name}: {value}" for name, value in report.get("headline", {}).items()]
        lines += ["", *(markdown(table) for table in report.get("tables", []))]
    if outcome.status != "ok" or not reports:
        lines.append(f"```\n{outcome.tail[-1500:].strip()}\n```\n")
    return lines
