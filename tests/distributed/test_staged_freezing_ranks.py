"""Stages on two gloo ranks, with DDP, FSDP1 and FSDP2: two stages are two runs, and resuming is exact, bit for bit."""

import json
from pathlib import Path

import pytest

from tests.launches.launch import run_composer

DRILLS: tuple[tuple[str, list[str]], ...] = (("ddp", []), ("fsdp1", []), ("fsdp2", ["lora"]))


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("mode", "lora"),
    [
        ("fsdp2", []),
        ("ddp", ["lora"]),
        *(pytest.param(mode, lora, marks=pytest.mark.drill) for mode, lora in DRILLS),
    ],
)
def test_stages_on_two_ranks(mode: str, lora: list[str], tiny_checkpoint: str, tmp_path: Path):
    script = Path(__file__).with_name("staged_run.py")
    run_composer(2, script, tiny_checkpoint, str(tmp_path), mode, *lora, timeout=900)
    for rank in range(2):
        found = json.loads((tmp_path / f"{mode}-{rank}.json").read_text())
        assert found == {"by hand": [], "resumed at 3": [], "resumed at 6": []}
