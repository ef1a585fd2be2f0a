"""Reading checkpoints: whole ones only, and the one before a damaged one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.torch_files import DamagedFile, read_torch_file
from tgmae.model.sharded_files import is_sharded_folder, read_header, verify_tensors
from tgmae.training.checkpoints.folder import FORMAT, list_checkpoints, newest_checkpoint
from tgmae.training.parallel import ALONE, World


def load_newest(folder: Path, world: World = ALONE) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Read the newest checkpoint that is whole; return its path (None where there is none), content, and what is wrong.

    Raises DamagedFile where there are checkpoints and none of them is whole. Every process must call it.
    """
    problems: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, _read(path, world), problems
        except DamagedFile as error:
            problems.append(str(error))
    if problems:
        raise DamagedFile(
            f"no checkpoint in {folder} is whole: {'; '.join(problems)}. Start over with --resume never, which keeps "
            "them, or from exported weights with --init-from RUN/hf"
        )
    return None, {}, []


def load_checkpoint(path: Path, world: World = ALONE) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; of a folder, what `restore` needs to read the rest. Every process must call it.

    Raises FileNotFoundError, or ValueError where it is not a whole checkpoint; the message then offers the newest whole
    one before it.
    """
    try:
        return _read(path, world)
    except DamagedFile as error:
        before = [other for other in list_checkpoints(path.parent) if other < path]
        if (whole := next((other for other in reversed(before) if _is_whole(other, world)), None)) is None:
            raise
        raise DamagedFile(f"{error}. The checkpoint before it is whole: --resume {whole}") from error


def _is_whole(path: Path, world: World) -> bool:
    try:
        _read(path, world)
    except ValueError:
        return False
    return True


def _read(path: Path, world: World) -> dict[str, Any]:
    if path.is_dir() and not is_sharded_folder(path):
        raise FileNotFoundError(
            f"{path} is a folder, and not a checkpoint; give one of its checkpoints, such as "
            f"{newest_checkpoint(path / 'checkpoints') or path / 'checkpoints' / 'step_00000100.pt'}"
        )
    if path.is_dir():
        return _read_folder(path, world)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; expected a file such as RUN/checkpoints/step_00000100.pt, or a folder .dcp"
        )
    state = read_torch_file(path, f"{path} is not a readable checkpoint")
    state = state if isinstance(state, dict) else {}
    number = _check_format(path, state)
    _check_parts(path, state, {"step", "videos", "config", "model", "optimizer"})
    if number < 3:
        state["model"] = {f"mae.{name}": weight for name, weight in state["model"].items()}
        state["parameters"] = [[f"mae.{name}" for name in names] for names in state.get("parameters", [])]
    return state


def _read_folder(path: Path, world: World) -> dict[str, Any]:
    """Read a folder's header, and tensors without contents in the place of others. Processes share the verifying."""
    problem = ""
    try:
        state = read_header(path)
        _check_format(path, state)
        verify_tensors(path, world.rank, world.size)
    except DamagedFile as error:
        problem = str(error)
    if problem := world.first(problem):
        raise DamagedFile(problem)
    _check_parts(path, state, {"step", "videos", "config", "parameters"})
    tensors = state.pop("tensors")
    state["model"] = {name.removeprefix("model."): one for name, one in tensors.items() if name.startswith("model.")}
    names = [name for group in state["parameters"] for name in group]
    moments: dict[int, dict[str, Any]] = {}
    for name, one in tensors.items():
        if name.startswith("optimizer."):
            parameter, _, kind = name.removeprefix("optimizer.").rpartition(".")
            moments.setdefault(names.index(parameter), {})[kind] = one
    state["optimizer"] = {"state": moments}
    return state


def _check_format(path: Path, state: dict[str, Any]) -> int:
    number = state.get("format", 1)
    if isinstance(number, int) and number > FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {number}, but this version of tgmae reads formats up to {FORMAT}; update "
            "tgmae, or start from its weights with --init-from RUN/hf"
        )
    return number if isinstance(number, int) else FORMAT


def _check_parts(path: Path, state: dict[str, Any], parts: set[str]) -> None:
    if not parts <= state.keys():
        raise ValueError(f"{path} is not a tgmae checkpoint")
