"""Group metrics of two gloo ranks are those of the whole weights, however these are shared out."""

from pathlib import Path

import pytest
import torch

from tests.launch import run_composer


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_norms_are_those_of_the_whole_weights(tiny_checkpoint: str, tmp_path: Path, mode: str) -> None:
    script = Path(__file__).with_name("group_metrics_run.py")
    run_composer(
        2, script, tiny_checkpoint, str(tmp_path), mode, env={"FSDP_VERSION": mode.removeprefix("fsdp")}, timeout=240
    )
    for rank in range(2):
        record = torch.load(tmp_path / f"{mode}-{rank}.pt")
        assert {key.split("/")[1] for key in record["logged"]} == {"vision", "merger", "adapter", "detection"}
        for key, values in record["logged"].items():
            # measured: 3e-12
            assert values == pytest.approx([norms[key] for norms in record["truth"]], rel=1e-9), key
            assert all(value > 0 for value in values)
