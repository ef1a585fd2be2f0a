"""tgmae-engine export | build | check | agree | distill: make what scores patches, and measure how well it does."""

from __future__ import annotations

from tgmae.cli.check import Check
from tgmae.cli.parser.subcommands import run_subcommand
from tgmae.cli.scorers import Agree, Distill
from tgmae.cli.tower import Build, Export

COMMANDS = {"export": Export, "build": Build, "check": Check, "agree": Agree, "distill": Distill}


def main() -> None:
    run_subcommand(
        "tgmae-engine",
        "Make the engines that score patches for text-guided masks, and measure how well they do.",
        [Distill.EXAMPLES[0], Check.EXAMPLES[0]],
        COMMANDS,
    )


if __name__ == "__main__":
    main()
