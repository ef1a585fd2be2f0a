"""A GPU job cannot pass by skipping: what a missing GPU or backend does to a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import skip_or_fail

pytest_plugins = "pytester"
CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.mark.parametrize(
    ("required", "outcome"), [("1", pytest.fail.Exception), ("0", pytest.skip.Exception), ("", pytest.skip.Exception)]
)
def test_a_missing_backend(required: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGMAE_REQUIRE_GPU", required)
    with pytest.raises(outcome, match="tensorrt is not installed"):
        skip_or_fail("tensorrt is not installed")


@pytest.mark.parametrize(("required", "ends"), [("1", "errors"), ("", "skipped")])
def test_a_missing_gpu(required: str, ends: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the test's fixtures, and for tests with the mark only."""
    monkeypatch.setenv("TGMAE_REQUIRE_GPU", required)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makeini("[pytest]\nmarkers = gpu")
    pytester.makepyfile("""
        import pytest

        @pytest.fixture
        def fails():
            1 / 0

        @pytest.mark.gpu
        def test_gpu(fails):
            pass

        def test_cpu():
            pass
    """)
    result = pytester.runpytest("-ra")
    result.assert_outcomes(passed=1, **{ends: 1})
    result.stdout.fnmatch_lines("*no CUDA device*")
