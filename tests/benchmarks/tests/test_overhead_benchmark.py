"""Check that `tests/benchmarks/overhead.py` measures every part on a small model and ends with its line of JSON."""

import json

import pytest

from tests.launches.launch import run_composer


@pytest.mark.slow
def test_it_ends_with_its_figures() -> None:
    arguments = ("--steps", "2", "--hidden-size", "64", "--num-layers", "2")
    report = json.loads(run_composer(0, "tests/benchmarks/overhead.py", *arguments).output.splitlines()[-1])
    assert all(value > 0 for value in report.values()), report
    assert report["guard_share"] < 1
