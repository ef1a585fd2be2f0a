"""tgmae-train [PRESET] [--flag value …]: pretrain a video masked autoencoder."""

from __future__ import annotations

import difflib
import sys
from typing import TYPE_CHECKING

import tyro

from tgmae.config import TrainConfig
from tgmae.presets import PRESETS
from tgmae.shapes.demo import provide_demo

if TYPE_CHECKING:  # decode workers import this module anew, and do without torch
    from tgmae.train import TrainResult


def parse(arguments: list[str]) -> TrainConfig:
    """The preset named first (demo where none is), changed by the flags. Exits with a message where it cannot."""
    preset = "demo"
    if arguments and not arguments[0].startswith("-"):
        preset, *arguments = arguments
        if preset not in PRESETS:
            near = difflib.get_close_matches(preset.lower(), PRESETS, n=1)
            sys.exit(
                f"tgmae-train: no preset {preset!r}{f'; did you mean {near[0]}?' if near else ''} "
                f"(there are: {', '.join(PRESETS)})"
            )
    for late in set(arguments) & PRESETS.keys():
        sys.exit(f"tgmae-train: the preset comes first: tgmae-train {late} --flag value …")
    return tyro.cli(
        TrainConfig,
        prog=f"tgmae-train {preset}",
        default=PRESETS[preset],
        args=arguments,
        description=f"Pretrain with the preset {preset}. Presets: {', '.join(PRESETS)}.",
    )


def run(config: TrainConfig) -> TrainResult:
    """Train; the demo makes its data first where they are missing."""
    provide_demo(config.data.manifest)
    from tgmae.train import train

    return train(config)


def main() -> None:
    try:
        run(parse(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"tgmae-train: {error}")
    except KeyboardInterrupt:
        sys.exit("tgmae-train: interrupted at once; steps after the last checkpoint are lost")


if __name__ == "__main__":
    main()
