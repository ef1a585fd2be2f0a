"""tgmae-train [PRESET | --config FILE] [--flag value ...]: pretrain a video masked autoencoder."""

from __future__ import annotations

import dataclasses
import difflib
import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dali_pipelines.workers.endings import PeerLost, first_line, leave, leave_on_signal, take_turn
from dali_pipelines.workers.meeting import read_place
from tgmae import __version__
from tgmae.cli.parser.flags import UsageError, find_typed, list_flags
from tgmae.cli.parser.help import draw_help, print_help
from tgmae.cli.parser.rules import check_effects
from tgmae.cli.parser.subcommands import describe, exit_for_usage
from tgmae.cli.parser.values import convert_values
from tgmae.config.run import TrainConfig
from tgmae.config.saved import read_config
from tgmae.presets import DESCRIPTIONS, PRESETS
from tgmae.shapes.demo import provide_demo
from tgmae.training.process import Stopped, ending_at_once, manual_garbage_collection

if TYPE_CHECKING:  # --help does without torch
    from tgmae.train import TrainResult

PROG = "tgmae-train"
EXAMPLES = (
    "tgmae-train ssv2 --data.manifest videos/manifest.parquet --run-dir runs/mine --epochs 200  "
    "# Train on your own videos, indexed by `tgmae-data index videos`.",
    "tgmae-train --config runs/mine/config.json  "
    "# Resume that run; with --run-dir and other flags, start another one like it.",
)
COMMON = (
    "run-dir", "resume", "device", "data.manifest", "data.stride", "data.num-workers", "epochs", "batch-size",
    "device-batch-size", "optim.base-lr", "mask.kind", "mask.ratio", "mask.scorer", "clip.model",
    "loss.contrastive",
)  # fmt: skip


@dataclass
class _Start:
    """The flag that is read before all others."""

    # Start from a saved configuration, RUN/config.json, instead of a preset. Without other flags this resumes that run,
    # whose --run-dir is in the file. --resume is auto unless it is given.
    config: Path | None = None


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, str]:
    """Return the configuration, and where it starts from: "preset demo" or "configuration FILE".

    The first argument may be a preset, or --config names a saved configuration; flags change either. Prints the help,
    or a message about what was typed, and exits.
    """
    try:
        base, source, flags = _split(list(arguments))
        if {"-h", "--help"} & set(flags):
            if _is_first():
                print_help(draw_train_help(base, source))
            sys.exit(0)
        known = list_flags(TrainConfig)
        typed = find_typed(PROG, flags, [*known, *list_flags(_Start)])
        if (late := _find_late_preset(flags)) is not None:
            raise UsageError(f"the preset comes first: {PROG} {late} --flag value ...")
        config = convert_values(PROG, TrainConfig, base, flags, known)
        check_effects(PROG, typed, list_flags(TrainConfig, config))
        if "device-batch-size" not in {flag.name for flag in typed}:
            config, source = _divide_batch(config, source)
        near = difflib.get_close_matches(config.resume, ("auto", "never"), n=1)
        if near and config.resume != near[0] and not Path(config.resume).exists():
            raise UsageError(f"there is no checkpoint {config.resume!r}; did you mean --resume {near[0]}?")
    except UsageError as error:
        exit_for_usage(PROG, error)
    return config, source


def _divide_batch(config: TrainConfig, source: str) -> tuple[TrainConfig, str]:
    """Make the device batch smaller where the batch has fewer clips for each process; say so in the source."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    share, rest = divmod(config.batch_size, num_processes)
    if rest or not 0 < share < config.device_batch_size or share % config.data.repeat:
        return config, source
    over = f" over {num_processes} processes" if num_processes > 1 else ""
    said = f"{source} with --device-batch-size {share} ({config.batch_size} clips{over})"
    return dataclasses.replace(config, device_batch_size=share), said


def _split(arguments: list[str]) -> tuple[TrainConfig, str, list[str]]:
    """Return the configuration to start from, a name for it, and the flags that change it."""
    preset = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    file, flags = _take_config(arguments)
    if preset is not None and preset not in PRESETS:
        near = difflib.get_close_matches(preset.lower(), PRESETS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        if Path(preset).is_file():
            meant = f"; did you mean --config {preset}?"
        raise UsageError(f"there is no preset {preset!r}{meant} (presets: {', '.join(PRESETS)})")
    if file is not None and preset is not None:
        raise UsageError(f"{preset} and --config {file} exclude each other: a run starts from a preset or from a file")
    if file is not None:
        config, is_as_written = read_config(file)
        edited = "" if is_as_written else ", edited by hand or damaged since a run wrote it"
        # Whether that run itself resumed anything does not matter to one that continues or repeats it.
        return dataclasses.replace(config, resume="auto"), f"configuration {file}{edited}", flags
    return PRESETS[preset or "demo"], f"preset {preset or 'demo'}", flags


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Return the file after --config, and the other arguments."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config=")), arguments[:place] + arguments[place + 1 :]
        if argument == "--config":
            if place + 1 == len(arguments):
                raise UsageError("--config needs a file, such as RUN/config.json")
            return Path(arguments[place + 1]), arguments[:place] + arguments[place + 2 :]
    return None, arguments


def _find_late_preset(flags: Sequence[str]) -> str | None:
    """Return a preset among the flags that is not the value of one."""
    switches = {flag.name.rpartition(".")[2] for flag in list_flags(TrainConfig) if flag.is_switch}
    for before, argument in zip(["", *flags], flags, strict=False):
        last = before.replace("_", "-").rpartition(".")[2].removeprefix("--").removeprefix("no-")
        is_value = before.startswith("--") and "=" not in before and last not in switches
        if argument in PRESETS and not is_value:
            return argument
    return None


def draw_train_help(base: TrainConfig, source: str) -> str:
    """Return the help, with the values of a configuration as the defaults."""
    about = (
        "Pretrain a video masked autoencoder from a preset (demo if none is named) or from a saved configuration. "
        f"Flags change single settings; the defaults below are those of the {source}."
    )
    widest = max(map(len, PRESETS))
    presets = ["presets:", *(f"  {name:<{widest}}  {text}" for name, text in DESCRIPTIONS.items())]
    usage = f"{PROG} [PRESET | --config FILE] [--flag value ...]"
    flags = [*list_flags(_Start), *list_flags(TrainConfig, base)]
    text = draw_help(usage, about, EXAMPLES, flags, ("config", *COMMON), title="settings of the run")
    return "\n\n".join([text, "\n".join(presets)])


def run(config: TrainConfig) -> TrainResult:
    """Train; the demo's data set is made first if it is missing."""
    with ending_at_once("while the demo's data set was made; the same command makes it again"):
        for manifest in config.data.manifests:
            provide_demo(manifest)
    # Imports make objects by the hundred thousand, which stay. Looking for garbage among them takes .4 s.
    with manual_garbage_collection():
        from tgmae.train import train

        return train(config)


def _is_first() -> bool:
    """Return whether this is the process that speaks for all."""
    return read_place(os.environ)[0] == 0


def main() -> None:
    faulthandler.register(signal.SIGQUIT, file=2, chain=True)  # Ctrl-\ shows what each thread of a stuck run does
    try:
        with ending_at_once("before the first step or after the last; nothing is lost"):
            config, source = parse(sys.argv[1:])
            if _is_first():  # this comes before torch, which takes long
                print(f"tgmae {__version__}  {source}, run folder {config.run_dir}", flush=True)
            result = run(config)
    except (ValueError, OSError) as error:
        leave(f"{PROG}: {describe(error)}", was_lost=isinstance(error, PeerLost))
    except Stopped as stopped:
        leave_on_signal(f"{PROG}: {stopped}", stopped.number)
    except Exception as error:  # no memory on the GPU, or a fault of ours: Python prints where
        take_turn(f"{PROG}: {type(error).__name__}: {first_line(error)}")
        raise
    if result.signal:
        sys.exit(128 + result.signal)


if __name__ == "__main__":
    main()
