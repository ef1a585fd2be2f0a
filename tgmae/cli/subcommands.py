"""Command lines of several subcommands, some of which take the flags of a preset."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, Union

import tyro

from tgmae.config import InputConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.presets import PRESETS

# The flags of `tgmae-train PRESET` that decide what a batch is, without a prefix of their own.
InputFlags = Annotated[InputConfig, tyro.conf.arg(name="")]


class Command(Protocol):
    def run(self) -> None: ...


@dataclass(frozen=True)
class ClipCommand:
    """What every command on a manifest's clips takes: `MANIFEST --preset NAME`, and flags that change the preset."""

    manifest: Annotated[Path, tyro.conf.Positional]  # made by `tgmae-data index` or `tgmae-data shapes`
    input: InputFlags
    preset: str = "demo"  # whose clips, masks and CLIP are meant; the flags below change them

    def read(self, split: str | None = None) -> tuple[InputConfig, Manifest]:
        """The configuration with this manifest, and its rows of a split; with text-guided masks all have a caption."""
        from tgmae.captions.policy import require_captions  # and torch with it, which decode workers do without

        config = dataclasses.replace(self.input, data=dataclasses.replace(self.input.data, manifest=self.manifest))
        manifest = read_manifest(self.manifest).select_split(config.data.split if split is None else split)
        if config.mask.kind == "tgm":
            manifest, note = require_captions(manifest, config.mask.no_caption)
            if note:
                print(note)
        return config, manifest


def name_some(words: str, videos: Sequence[Any], more: str = "") -> None:
    """The first ten of `videos`, each with its path and reason, on stderr; then how many more there are."""
    for video in videos[:10]:
        print(f"{words} {video.path}: {video.reason}", file=sys.stderr)
    if len(videos) > 10:
        print(f"… and {len(videos) - 10} more{more}", file=sys.stderr)


def run_subcommand(prog: str, description: str | None, commands: dict[str, type[Any]]) -> None:
    """Parse sys.argv, run the subcommand it names, and turn what the user can mend into one line and exit code 1."""
    arguments = sys.argv[1:]
    try:
        command: Command = tyro.cli(
            _union(commands, _preset(arguments)), prog=prog, description=description, args=arguments
        )
        command.run()
    except (ValueError, OSError) as error:
        sys.exit(f"{prog}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{prog}: interrupted; the same command goes on from here")


def _union(commands: dict[str, type[Any]], preset: str) -> Any:
    """The subcommands as tyro wants them; those on clips start from the preset's values."""
    members = []
    for name, command in commands.items():
        if issubclass(command, ClipCommand):
            default = command(manifest=tyro.MISSING, input=_input_of(preset), preset=preset)
            members.append(Annotated[command, tyro.conf.subcommand(name, default=default)])
        else:
            members.append(Annotated[command, tyro.conf.subcommand(name)])
    return Union[tuple(members)]  # noqa: UP007 - made at run time


def _input_of(preset: str) -> InputConfig:
    config = PRESETS[preset]
    return InputConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(InputConfig)})


def _preset(arguments: list[str]) -> str:
    """The preset that is asked for: its values must be known before the other flags are read."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--preset":
            value = value or next(iter(arguments[place + 1 :]), "")
            if value not in PRESETS:
                raise ValueError(f"no preset {value!r} (there are: {', '.join(PRESETS)})")
            return value
    return "demo"
