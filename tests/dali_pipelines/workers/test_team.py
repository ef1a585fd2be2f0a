"""How work is shared. Real processes: tests/tgmae/cli/test_shared_commands.py."""

from __future__ import annotations

from dali_pipelines.workers.team import Team


def test_shares_are_disjoint_and_complete() -> None:
    shares = [Team(rank, 3).divide(range(8)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
