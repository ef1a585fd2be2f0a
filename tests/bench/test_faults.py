"""What tests of faults count reaches the report."""

from __future__ import annotations

import pytest

from bench.faults.__main__ import run_part


@pytest.mark.slow
def test_counts_come_back() -> None:
    part = run_part(("tests/tgmae/telemetry/test_metrics.py", "-k", "flipped_bit"))
    [counts] = part.pop("counts")
    assert part == {"passed": 1, "failed": [], "skipped": [], "seconds": part["seconds"]}
    assert counts["test"] == "tests/tgmae/telemetry/test_metrics.py::test_no_flipped_bit_is_silent"
    assert (counts["what"], counts["tried"], counts["silent"]) == ("metrics.jsonl", 3000, 0)
    with pytest.raises(ValueError, match=r"pytest ran no test for: .*nonsense"):
        run_part(("tests/tgmae/telemetry/test_metrics.py", "-k", "nonsense"))
