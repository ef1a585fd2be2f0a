"""Print which room imports which, or bring the table in docs/design.md up to date: python docs/imports.py [--write].

A room is a folder of tgmae, one of its top-level modules, or another package.
tests/test_docs.py compares the table.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bench", "tgmae", "dali_pipelines", "engines", "kernels")
BEGIN, END = "<!-- made by docs/imports.py -->\n```text\n", "```\n"


def name_room(module: str) -> str:
    """Return the room of a module, or of a name imported from one."""
    package, *rest = module.split(".")
    if package != "tgmae" or not rest:
        return package
    return f"tgmae.{rest[0]}"


def read_imports(root: Path) -> dict[str, set[str]]:
    """Return the other rooms that each room of the checkout at `root` imports, wherever in a file it does."""
    rooms: dict[str, set[str]] = {}
    for file in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        if file.name == "__init__.py" and file.parent.parent == root:
            continue
        targets = rooms.setdefault(room := name_room(".".join(file.relative_to(root).with_suffix("").parts)), set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets |= {name_room(f"{node.module}.{alias.name}") for alias in node.names}
            elif isinstance(node, ast.Import):
                targets |= {name_room(alias.name) for alias in node.names}
        targets.discard(room)
    return {room: targets & rooms.keys() for room, targets in rooms.items()}


def draw_table(root: Path = ROOT) -> str:
    """Return a line for each room and the rooms that it imports; these stand below it wherever there is no circle."""
    rooms = read_imports(root)
    left = sorted(rooms, key=lambda room: (PACKAGES.index(room.split(".")[0]), room))
    order: list[str] = []
    while left:
        free = [room for room in left if not any(room in rooms[other] for other in left)]
        order.append((free or left)[0])
        left.remove(order[-1])
    width = max(map(len, order))
    lines = [f"{room:{width}}  {', '.join(sorted(rooms[room], key=order.index)) or '–'}" for room in order]
    return "\n".join(lines) + "\n"


def main() -> None:
    if "--write" not in sys.argv[1:]:
        print(draw_table(), end="")
        return
    page = ROOT / "docs" / "design.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}{draw_table()}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
