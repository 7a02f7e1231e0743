"""Base checkpoints between transformers 4 and 5: equal logits, or refused with the reason.

They need both environments, that of `make environment` and that of `make test-next`.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from recipe.families import FAMILIES
from recipe.models.vlm import IS_TRANSFORMERS_4
from tests.checkpoints.version_logits import read, write

ROOT = Path(__file__).resolve().parents[2]
# Releases compute angles and places of position embeddings in float32, each in its own way; measured: 0 to 3.1e-7.
TOLERANCE = 1e-6
OTHER = ROOT / (".venv-next" if IS_TRANSFORMERS_4 else ".venv") / "bin" / "python"

pytestmark = pytest.mark.skipif(not OTHER.exists(), reason="only one of .venv and .venv-next is there")


def elsewhere(action: str, folder: Path, results: Path) -> dict[str, Any]:
    """What the other environment's interpreter finds."""
    command = [str(OTHER), "-m", "tests.checkpoints.version_logits", action, str(folder), str(results)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(results)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys() == FAMILIES.keys()
    for family, (logits, names, settings) in expected.items():
        assert not isinstance(found[family], str), found[family]
        assert found[family][1:] == (names, settings)
        assert float(logits.std()) > 0.05
        assert float((found[family][0] - logits).abs().max()) <= TOLERANCE


def test_checkpoints_of_4_and_of_5_are_read_by_5_and_only_those_of_4_by_4(tmp_path: Path):
    write(here := tmp_path / "here")
    written_there = elsewhere("write", there := tmp_path / "there", tmp_path / "written")
    read_there = elsewhere("read", here, tmp_path / "read")
    written_here, read_here = read(here), read(there)
    by_4 = (written_here, read_here) if IS_TRANSFORMERS_4 else (written_there, read_there)
    by_5 = (written_there, read_there) if IS_TRANSFORMERS_4 else (written_here, read_here)
    assert_equal(by_5[1], by_4[0])  # what 4 wrote
    assert not any(isinstance(result, str) for result in by_5[0].values())
    for family, message in by_4[1].items():  # first of the tokenizer; tests/models/test_vlm.py has what follows
        assert isinstance(message, str), family
        assert "cannot read" in message and "\n" not in message
