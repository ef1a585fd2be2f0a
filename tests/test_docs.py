"""The documentation names things that exist: links and anchors, files, commands, flags."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("tgmae", "dali_pipelines", "engines", "kernels", "bench", "tests", "docs")
# Flags of every command, and of other programs: torchrun, srun, docker, nsys, git.
FOREIGN_FLAGS = {
    "signals-to-handle", "help", "nproc-per-node", "nnodes", "node-rank", "master-addr", "master-port",
    "max-restarts", "ntasks", "kill-on-bad-exit", "shm-size", "capture-range-end", "report", "stat",
    "standalone", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "log-dir", "tee", "job-name", "output", "open-mode",
    "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue", "numa-binding",
}  # fmt: skip

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def find_anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find_names() -> set[str]:
    """Return every field of a class and every "--option" in the source of the packages, as typed on a command line."""
    names: set[str] = set()
    for file in [path for folder in FOLDERS if folder != "tests" for path in (ROOT / folder).rglob("*.py")]:
        source = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id.replace("_", "-"))
        names |= set(re.findall(r'"--([\w-]+)', source))
    return names


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in find_anchors(target)):
            broken.append(link)
    assert not broken


@every_page
def test_files_and_modules_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = re.findall(rf"\b(?:{'|'.join(FOLDERS)})/[\w/.-]+\.(?:py|md|json|png)\b", text)
    modules = re.findall(r"(?:python -m |`)((?:bench|tgmae)\.[a-z_.]+[a-z])", text)
    missing = [file for file in files if "NAME" not in file and not (ROOT / file).exists()]
    for module in modules:
        path = ROOT.joinpath(*module.split("."))
        if not (path.is_dir() or path.with_suffix(".py").exists()):
            missing.append(module)
    assert not missing


def test_pages_named_in_code_exist() -> None:
    named: dict[str, set[str]] = {}
    for folder in FOLDERS:
        if folder not in ("tests", "docs"):
            for file in (ROOT / folder).rglob("*.py"):
                for page in re.findall(r"\bdocs/\w+\.md\b", file.read_text(encoding="utf-8")):
                    named.setdefault(page, set()).add(str(file.relative_to(ROOT)))
    assert {page: files for page, files in named.items() if not (ROOT / page).exists()} == {}


@pytest.mark.slow
@every_page
def test_commands_and_flags_exist(page: Path) -> None:
    """Flags are looked up by name only, not by command: every part of one is a field or an option of some command."""
    text = page.read_text(encoding="utf-8")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert set(re.findall(r"(?<=[`\s])tgmae-[a-z]+(?=[`\s])", text)) <= scripts.keys()
    known = find_names() | FOREIGN_FLAGS
    flags = re.findall(r"(?<![\w-])--([a-z][a-z0-9.-]*[a-z0-9])", text)
    parts = {part for flag in flags for part in flag.removeprefix("no-").replace(".no-", ".").split(".")}
    assert {part for part in parts if part not in known and f"no-{part}" not in known} == set()


@pytest.mark.slow
def test_the_table_of_imports_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("imports", ROOT / "docs" / "imports.py")
    assert spec is not None
    assert spec.loader is not None
    imports = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imports)
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert imports.BEGIN + imports.draw_table() + imports.END in page, "run: python docs/imports.py --write"
