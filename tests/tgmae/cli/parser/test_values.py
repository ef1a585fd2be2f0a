"""Values that cannot be are refused in one line, in the words of the help."""

from __future__ import annotations

import pytest

from tgmae.cli import data, train
from tgmae.cli.parser.flags import UsageError
from tgmae.cli.parser.subcommands import parse_command


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--epochs many", "--epochs many cannot be read; expected --epochs INT"),
        ("--epochs 3 --epochs=many", "--epochs=many cannot be read; expected --epochs INT"),
        ("--max_steps 1.5", "--max_steps 1.5 cannot be read; expected --max-steps INT"),
        ("--epochs --compile", "--epochs cannot be read; expected --epochs INT"),
        ("--optim.betas 0.9", "--optim.betas 0.9 cannot be read; expected --optim.betas FLOAT FLOAT"),
        ("--pipeline pyv", "--pipeline pyv cannot be read; expected --pipeline {dali,pyav}"),
        ("--mask.ratio 1.5", "--mask.ratio must lie strictly between 0 and 1, got 1.5"),
        ("--data.flip yes", "unrecognized options: yes (tgmae-train --help lists all flags)"),
    ],
)
def test_one_line_says_what_was_expected(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.parse(typed.split())
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"tgmae-train: {said}\n")


def test_a_missing_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"^MANIFEST is missing \(tgmae-data show --help lists all flags\)$"):
        parse_command("tgmae-data show", data.Show, ["--count", "3"])
    assert capsys.readouterr() == ("", "")
