"""Imports inside bench go one way: questions, then rooms for one of them each, then workloads, then the harness."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"
LEVELS = {
    "harness": 0, "workloads": 1, "costs": 2, "rivals": 2, "gpu_report": 2, "pictures": 2, "faults": 2, "captions": 2,
    "study": 2, "question": 3,
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Return the modules of bench that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "bench" else {f"bench.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("bench.")}


def room_of(module: str) -> str:
    _, room, *rest = module.split(".")
    return room if rest else "question"


def test_imports_inside_bench_go_one_way() -> None:
    modules = {".".join(path.relative_to(BENCH.parent).with_suffix("").parts): path for path in BENCH.rglob("*.py")}
    imports = {name: imports_of(path) for name, path in modules.items() if path.name != "__init__.py"}
    assert {room_of(name) for name in imports} == set(LEVELS)
    for module, imported in imports.items():
        room = room_of(module)
        for other in imported:
            is_below = LEVELS[room_of(other)] < LEVELS[room]
            assert is_below or (room_of(other) == room != "question"), f"{module} must not import {other}"
    tuple(TopologicalSorter(imports).static_order())  # raises CycleError
