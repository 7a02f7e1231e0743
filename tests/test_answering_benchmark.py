"""`tests/benchmarks/answering.py` runs on a genuine checkpoint and ends with its line of JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launches.launch import REPOSITORY


@pytest.mark.slow
def test_it_ends_with_its_figures(trained_checkpoint: Path) -> None:
    script = REPOSITORY / "tests" / "benchmarks" / "answering.py"
    command = [sys.executable, str(script), "--checkpoint", str(trained_checkpoint), "--images", "3", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    names = {"boxes_per_s_head", "boxes_per_s_text", "ratio", "f1_head", "f1_text", "batch_size", "ratio_images"}
    assert report.keys() == names and report["ratio_images"] > 0
    assert report["boxes_per_s_head"] > 0 <= report["f1_head"] <= 1
    assert "3 pictures" in done.stdout and done.stdout.count("| head |") == 2
