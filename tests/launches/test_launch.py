"""The helper of the two-process tests itself."""

from pathlib import Path

import pytest

from tests.launches.launch import run_composer

SUM_RANKS = """
import torch
from composer.utils import dist
dist.initialize_dist("cpu")
total = torch.tensor([dist.get_global_rank() + 1.0])
dist.all_reduce(total)
print(f"total {total.item()} of {dist.get_world_size()}")
"""


@pytest.mark.world_size(2)
def test_two_ranks_meet(tmp_path: Path) -> None:
    script = tmp_path / "sum_ranks.py"
    script.write_text(SUM_RANKS)
    assert "total 3.0 of 2" in run_composer(2, script).output


@pytest.mark.world_size(2)
def test_a_failing_rank_fails_the_launch(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("import os, sys\nif os.environ['RANK'] == '1':\n    sys.exit('no luck on rank 1')\n")
    with pytest.raises(AssertionError, match="no luck on rank 1"):
        run_composer(2, script)


@pytest.mark.world_size(2)
def test_a_hanging_rank_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(AssertionError, match="ran past 3 s"):
        run_composer(2, script, timeout=3)
