"""The house rules that imports and sizes must keep: one direction, no circles, small folders, short files."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each package may import of the others: bench → tgmae → {dali_pipelines, engines} → kernels.
LAYERS: dict[str, set[str]] = {
    "bench": {"tgmae", "dali_pipelines", "engines", "kernels"},
    "tgmae": {"dali_pipelines", "engines", "kernels"},
    "dali_pipelines": {"kernels"},
    "engines": {"kernels"},
    "kernels": set(),
}
PRODUCT = [package for package in LAYERS if package != "bench"]
MAX_FILES = 12  # Python files side by side, not counting __init__.py
MAX_BENCH_FILES = 15  # bench's top level: one file a question
MAX_LINES = 320

Graph = dict[str, set[str]]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """Return the dotted name of a file of this project; a package's __init__.py has the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files(*LAYERS)}


def read_imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything that a module's source imports, wherever in the file it stands.

    `from a import b` yields both a and a.b, because b may be a module. A string argument of import_module or
    __import__ counts as an import.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def imports_of(module: str) -> Iterator[tuple[int, str]]:
    path = MODULES[module]
    return read_imports(path.read_text(), module, is_package=path.name == "__init__.py")


def file_graph(*packages: str) -> Graph:
    """Return which modules of `packages` each of their modules imports.

    The packages around an imported module do not count: their __init__.py files import nothing of their own package,
    which `test_importing_a_file_loads_no_others` holds.
    """
    names = {name for name in MODULES if name.split(".")[0] in packages}
    return {name: {imported for _, imported in imports_of(name)} & names - {name} for name in names}


def room_of(module: str) -> str:
    """Return the room of a module of tgmae: a folder, or a module at its top level."""
    return ".".join(module.split(".")[:2])


def join_rooms(graph: Graph) -> Graph:
    rooms: Graph = {room_of(name): set() for name in graph}
    for name, imported in graph.items():
        rooms[room_of(name)] |= {room_of(other) for other in imported} - {room_of(name)}
    return rooms


def find_circle(graph: Graph) -> list[str]:
    """Return the nodes of a circle in order, the first again at the end; an empty list where there is none."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        for other in sorted(graph[node]):
            if circle := visit(other, [*path, node]):
                return circle
        finished.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := visit(node, []))), [])


def explain(circle: list[str], room: bool) -> str:
    """Return a line for each step of a circle, with the imports that make it."""
    lines = []
    for here, there in itertools.pairwise(circle):
        lines.append(f"{here} → {there}")
        for module in MODULES:
            if (room_of(module) if room else module) != here:
                continue
            lines += [
                f"    {MODULES[module].relative_to(ROOT)}:{line} imports {name}"
                for line, name in imports_of(module)
                if name in MODULES and (room_of(name) if room else name) == there
            ]
    return "\n".join(lines)


@pytest.mark.parametrize("package", LAYERS)
def test_imports_run_one_way(package: str) -> None:
    forbidden = {"tests", *LAYERS} - {package} - LAYERS[package]
    found = {
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {name.split('.')[0]}"
        for module in MODULES
        if module.split(".")[0] == package
        for line, name in imports_of(module)
        if name.split(".")[0] in forbidden
    }
    assert not found, "\n".join(sorted(found))


def test_no_circle_between_the_rooms_of_tgmae() -> None:
    circle = find_circle(join_rooms(file_graph("tgmae")))
    assert not circle, explain(circle, room=True)


@pytest.mark.parametrize("package", LAYERS)
def test_no_circle_between_files(package: str) -> None:
    circle = find_circle(file_graph(package))
    assert not circle, explain(circle, room=False)


@pytest.mark.parametrize("package", LAYERS)
def test_importing_a_file_loads_no_others(package: str) -> None:
    """Python runs the __init__.py of every package around a file, so these import nothing of their own package."""
    found = {
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in python_files(package)
        if path.name == "__init__.py"
        for line, name in imports_of(module_name(path))
        if name.split(".")[0] == package
    }
    assert not found, "\n".join(sorted(found))


def test_no_folder_is_crowded() -> None:
    crowded = {}
    for folder in {path.parent for path in python_files(*LAYERS, "tests")}:
        count = sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        if count > (MAX_BENCH_FILES if folder == ROOT / "bench" else MAX_FILES):
            crowded[str(folder.relative_to(ROOT))] = count
    assert not crowded, f"folders with more than {MAX_FILES} files side by side: {crowded}"


def test_no_file_of_the_product_is_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in python_files(*PRODUCT)}
    long = {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > MAX_LINES}
    assert not long, f"files of more than {MAX_LINES} lines: {long}"


def test_the_reader_sees_every_way_to_import() -> None:
    source = """
import a.b as c, d
from e import f
from . import g
from .h import i
from ..j import k
if TYPE_CHECKING:
    from l import m
def function():
    import n.o
    importlib.import_module("p.q")
    import_module("r", package=None)
    __import__("s")
    print("t")
"""
    names = [name for _, name in read_imports(source, "top.room.file")]
    expected = "a.b d e e.f top.room top.room.g top.room.h top.room.h.i top.j top.j.k l l.m n.o p.q r s"
    assert sorted(names) == sorted(expected.split())
    assert [name for _, name in read_imports("from . import g", "top.room", is_package=True)] == [
        "top.room",
        "top.room.g",
    ]
    assert (3, "e.f") in read_imports(source, "top.room.file")


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"e"}, "e": {"b"}}
    assert find_circle(graph) == ["b", "d", "e", "b"]
    assert find_circle({**graph, "e": {"c"}}) == []
    rooms = join_rooms(
        {
            "tgmae.a.x": {"tgmae.b.y", "tgmae.a.z"},
            "tgmae.b.y": set(),
            "tgmae.a.z": set(),
            "tgmae.c": {"tgmae.a.x"},
        }
    )
    assert rooms == {
        "tgmae.a": {"tgmae.b"},
        "tgmae.b": set(),
        "tgmae.c": {"tgmae.a"},
    }


def test_the_tree_is_read() -> None:
    """An import that is there today is seen, so that a rule cannot pass by reading nothing."""
    graph = file_graph(*LAYERS)
    assert "kernels.launch" in graph["kernels.topk_mask"]
    assert "engines.config" in graph["tgmae.config.run"]
