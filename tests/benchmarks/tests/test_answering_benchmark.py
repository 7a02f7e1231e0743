"""Check that `tests/benchmarks/answering.py` runs on a genuine checkpoint and ends with its line of JSON."""

import json
from pathlib import Path

import pytest

from tests.launches.launch import run_composer


@pytest.mark.slow
def test_it_ends_with_its_figures(trained_checkpoint: Path) -> None:
    arguments = ("--checkpoint", str(trained_checkpoint), "--images", "3", "--repeats", "1")
    output = run_composer(0, "tests/benchmarks/answering.py", *arguments).output
    report = json.loads(output.splitlines()[-1])
    names = {"boxes_per_s_head", "boxes_per_s_text", "ratio", "f1_head", "f1_text", "batch_size", "ratio_images"}
    assert report.keys() == names and report["ratio_images"] > 0
    assert report["boxes_per_s_head"] > 0 <= report["f1_head"] <= 1
    assert "3 images" in output and output.count("| head |") == 2
