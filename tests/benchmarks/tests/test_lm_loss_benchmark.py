"""Check that `tests/benchmarks/lm_loss.py` ends with its line of JSON; what the loss keeps: `test_token_losses.py`."""

import json

import pytest

from tests.launches.launch import run_composer


@pytest.mark.slow
def test_it_ends_with_its_figures() -> None:
    arguments = ("--sizes", "512", "16", "2000", "--cases", "float32 trained", "bfloat16 frozen")
    report = json.loads(run_composer(0, "tests/benchmarks/lm_loss.py", *arguments).output.splitlines()[-1])
    assert report.keys() == {"float32 trained", "bfloat16 frozen", "lm_loss_memory_ratio", "lm_loss_time_ratio"}
    assert all(case.keys() == {"memory_ratio", "time_ratio"} for case in list(report.values())[:2])
