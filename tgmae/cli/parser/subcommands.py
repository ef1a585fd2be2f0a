"""Command lines with subcommands, and what the subcommands on a manifest's clips have in common."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, cast

import tyro

from dali_pipelines.workers.endings import PeerLost, leave, leave_on_signal
from dali_pipelines.workers.meeting import read_place
from dali_pipelines.workers.team import ALONE, Team, join_team
from tgmae.cli.parser.flags import UsageError, find_typed, list_flags
from tgmae.cli.parser.help import describe_flag, draw_help, print_help
from tgmae.cli.parser.rules import check_effects
from tgmae.cli.parser.values import convert_values
from tgmae.config.run import InputConfig
from tgmae.presets import PRESETS, PresetName
from tgmae.training.process import Stopped

if TYPE_CHECKING:  # --help does without pyarrow
    from tgmae.data.manifest import Manifest

C = TypeVar("C", bound="Command")

CLIP_FLAGS = (
    "clip.model", "clip.weights", "clip.tag", "clip.trust-code", "clip.engine", "clip.precision", "clip.batch",
    "clip.cuda-graph", "clip.cache-dir",
)  # fmt: skip
# What decides which clips are cut from the videos.
SAMPLING_FLAGS = (
    "device", "seed", "data.root", "data.split", "data.sampling", "data.stride", "data.crop-scales", "data.flip",
    "data.captions", "captions.sources", "captions.per-video",
    "model.image-size", "model.num-frames", "model.patch-size", "model.tubelet-size",
)  # fmt: skip


class Command:
    """A subcommand: a dataclass whose fields are its flags, and which `run` carries out.

    EXAMPLES  two command lines for the help, each with what it does after "  # "
    COMMON    names of the flags that the help lists first
    READS     names of the flags that it offers of the configuration that runs share; None offers all of it
    CHOICES   for a flag that accepts less than its type says, what it accepts
    HINTS     what to do instead of typing a flag that it does not offer
    """

    EXAMPLES: ClassVar[tuple[str, ...]]
    COMMON: ClassVar[tuple[str, ...]] = ()
    READS: ClassVar[tuple[str, ...] | None] = None
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    HINTS: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def make_default(cls, arguments: Sequence[str]) -> Command | None:
        """Return the instance whose values the flags change; None for the defaults of the fields."""
        return None

    def run(self) -> None:
        raise NotImplementedError


class SharedCommand(Command):
    """A command whose work several processes may share, on one machine or several; `share` carries it out."""

    def run(self) -> None:
        self.share(ALONE)

    def share(self, team: Team) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class ClipCommand(Command):
    """A command on the clips of a manifest. Its flags start from the values of a preset."""

    HINTS: ClassVar = {"data.manifest": "MANIFEST, the first argument, names it"}
    WITHOUT_TEXT: ClassVar = ""  # how the command does without captions, for messages; "" where it cannot

    # Parquet file made by `tgmae-data index` or `tgmae-data shapes`.
    manifest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST")]
    input: Annotated[InputConfig, tyro.conf.arg(name="")]  # without a prefix: --mask.ratio, as for tgmae-train
    preset: PresetName = "demo"  # Preset of tgmae-train that gives the defaults of the flags below.

    @classmethod
    def make_default(cls, arguments: Sequence[str]) -> Command:
        preset = _find_preset(arguments)
        config = PRESETS[preset]
        names = [field.name for field in dataclasses.fields(InputConfig)]
        values = InputConfig(**{name: getattr(config, name) for name in names})
        if values.mask.scorer == "auto":  # for training: these commands make or compare what it finds
            values = dataclasses.replace(values, mask=dataclasses.replace(values.mask, scorer="patch"))
        return cls(manifest=tyro.MISSING, input=values, preset=preset)

    def read(self, split: str | None = None, with_text: bool = True) -> tuple[InputConfig, Manifest]:
        """Return the configuration with this manifest, and the manifest's rows of a split, --data.split by default.

        with_text  use text-guided masks: every video then has a caption, and a note about that is printed
        """
        from tgmae.captions.policy import require_captions
        from tgmae.data.mixing.joined import open_data_sets

        config = dataclasses.replace(self.input, data=dataclasses.replace(self.input.data, manifest=self.manifest))
        manifest = open_data_sets(config.data).select_split(config.data.split if split is None else split)
        if with_text:
            config = dataclasses.replace(config, mask=dataclasses.replace(config.mask, kind="tgm"))
            manifest, note = require_captions(manifest, config.mask.no_caption, self.WITHOUT_TEXT, config.captions)
            if note:
                print(note)
        return config, manifest


def name_some(words: str, videos: Sequence[Any], more: str = "") -> None:
    """Print path and reason of the first ten of `videos` to stderr, and how many more there are."""
    for video in videos[:10]:
        print(f"{words} {video.path}: {video.reason}", file=sys.stderr)
    if len(videos) > 10:
        print(f"… and {len(videos) - 10} more{more}", file=sys.stderr)


def run_subcommand(prog: str, about: str, examples: Sequence[str], commands: Mapping[str, type[Any]]) -> None:
    """Run the subcommand that sys.argv names. An error that the user can fix becomes one line and an exit code."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # tgmae/cli/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        name, *arguments = sys.argv[1:] or [""]
        if name in ("-h", "--help"):
            if read_place(os.environ)[0] == 0:
                print_help(_draw_overview(prog, about, examples, commands))
            return
        if name not in commands:
            near = difflib.get_close_matches(name, commands, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            wrong = f"there is no command {name!r}{meant}" if name else "no command was given"
            raise UsageError(f"{wrong} (commands: {', '.join(commands)})")
        if {"-h", "--help"} & set(arguments):
            if read_place(os.environ)[0] == 0:
                parse_command(f"{prog} {name}", commands[name], arguments)
            return
        with join_team() as team:
            with team.main_first():
                command = parse_command(f"{prog} {name}", commands[name], arguments)
                if team.size > 1 and not isinstance(command, SharedCommand):
                    raise ValueError(f"{name} is for one process, not {team.size}; run it without torchrun or srun")
            if isinstance(command, SharedCommand):
                command.share(team)
            else:
                command.run()
    except UsageError as error:
        exit_for_usage(prog, error)
    except (ValueError, OSError) as error:
        leave(f"{prog}: {describe(error)}", was_lost=isinstance(error, PeerLost))
    except Stopped as stopped:
        leave_on_signal(f"{prog}: {stopped}", stopped.number)
    except KeyboardInterrupt:
        if read_place(os.environ)[0] == 0:  # Ctrl-C reaches all processes
            print(f"{prog}: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def describe(error: ValueError | OSError) -> str:
    """Return what an error says, in words where its output is a pipe that `head` has closed."""
    return "nothing reads its output any more" if isinstance(error, BrokenPipeError) else str(error)


def exit_for_usage(prog: str, error: UsageError) -> None:
    """Leave with the message on stderr and exit code 2."""
    leave(f"{prog}: {error}", 2)


def parse_command(prog: str, command: type[C], arguments: Sequence[str]) -> C:
    """Return the command with the values that were typed, or print its help and exit.

    Raises UsageError for a flag that the command does not read or that has no effect beside the others, and for values
    that cannot be.
    """
    default: Any = command.make_default(arguments)
    flags = list_flags(command, default)
    if {"-h", "--help"} & set(arguments):
        print_help(draw_command_help(prog, command, default))
        sys.exit(0)
    typed = find_typed(prog, arguments, flags, command.HINTS)
    parsed = convert_values(prog, command, default, arguments, flags)
    check_effects(prog, typed, list_flags(command, parsed))
    return parsed


def draw_command_help(prog: str, command: type[Command], default: Command | None) -> str:
    """Return the help of a command, with the defaults of an instance or of the fields."""
    flags = list_flags(command, default)
    positional = [describe_flag(flag) for flag in flags if flag.is_positional]
    usage = " ".join([prog, *positional, "[--flag value ...]"])
    return draw_help(usage, inspect.cleandoc(command.__doc__ or ""), command.EXAMPLES, flags, command.COMMON)


def _draw_overview(prog: str, about: str, examples: Sequence[str], commands: Mapping[str, type[Any]]) -> str:
    widest = max(map(len, commands))
    lines = [
        f"  {name:<{widest}}  {inspect.cleandoc(command.__doc__ or '').partition(chr(10))[0]}"
        for name, command in commands.items()
    ]
    closing = f"{prog} COMMAND --help shows the flags of a command."
    return "\n\n".join([
        draw_help(f"{prog} COMMAND ...", about, examples, [], []), "\n".join(["commands:", *lines]), closing
    ])  # fmt: skip


def _find_preset(arguments: Sequence[str]) -> PresetName:
    """Return the preset that is asked for: its values must be known before the other flags are read."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--preset":
            value = value or next(iter(arguments[place + 1 :]), "")
            if value not in PRESETS:
                raise UsageError(f"there is no preset {value!r} (presets: {', '.join(PRESETS)})")
            return cast(PresetName, value)
    return "demo"
