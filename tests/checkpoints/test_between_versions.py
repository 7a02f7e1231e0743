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

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = {major: ROOT / folder / "bin" / "python" for major, folder in {4: ".venv", 5: ".venv-next"}.items()}
# Measured: 0. For Qwen3-VL 4 and 5 place position embeddings in float32, each in its own way: 2.5e-7.
TOLERANCES = {"qwen2_vl": 1e-12, "qwen2_5_vl": 1e-12, "qwen3_vl": 1e-6}

pytestmark = pytest.mark.skipif(
    not all(python.exists() for python in PYTHONS.values()), reason="only one of .venv and .venv-next is there"
)


def found_by(major: int, action: str, folder: Path) -> dict[str, Any]:
    """What `version_logits.py` finds with that transformers; not here, where tests compute angles in float64."""
    results = folder.with_name(f"{folder.name}_{action}_by_{major}.pt")
    command = [PYTHONS[major], "-m", "tests.checkpoints.version_logits", action, folder, results]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(results)


def test_what_4_wrote_is_read_by_5(tmp_path: Path):
    written = found_by(4, "write", tmp_path / "base")
    read = found_by(5, "read", tmp_path / "base")
    assert read.keys() == written.keys() == FAMILIES.keys()
    for family, (logits, *names_and_settings) in written.items():
        assert not isinstance(read[family], str), read[family]
        assert list(read[family][1:]) == names_and_settings
        assert float(logits.std()) > 0.05
        assert float((read[family][0] - logits).abs().max()) <= TOLERANCES[family]


def test_what_5_wrote_is_refused_by_4(tmp_path: Path):
    """First for its tokenizer; tests/models/test_vlm.py has what follows."""
    written = found_by(5, "write", tmp_path / "base")
    assert not any(isinstance(result, str) for result in written.values())
    for family, message in found_by(4, "read", tmp_path / "base").items():
        assert isinstance(message, str), family
        assert "has a tokenizer that transformers 4." in message and "install the one that wrote it" in message
        assert "\n" not in message
