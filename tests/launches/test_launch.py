"""Check the helper that launches scripts."""

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

SHOW = """
import os, sys, time
names = "KEY RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK MASTER_ADDR PYTHONUNBUFFERED PYTHONPATH"
print({name: os.environ[name] for name in names.split()})
print(sys.argv, sys.path[0], __name__, __file__, os.getcwd(), repr(sys.stdin.read()))
print("to stderr", file=sys.stderr)
time.sleep(3 * int(os.environ["RANK"]))  # the launcher kills what still runs when one rank fails
sys.exit(3 * int(os.environ["RANK"]))
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
    with pytest.raises(AssertionError, match="ran past 10 s") as raised:
        run_composer(2, script, timeout=10)  # with two suites at work a rank takes seconds to get there
    assert str(raised.value).count('hang.py", line 2') == 2, "each rank shows where it hangs"


@pytest.mark.world_size(2)
def test_a_process_that_a_rank_leaves_behind_is_waited_for(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(f"import os, time\nif os.fork() == 0:\n    time.sleep(2)\n    open('{tmp_path}/end', 'w')\n")
    run_composer(1, script)
    assert (tmp_path / "end").exists()


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_a_forked_launch_is_the_command(tmp_path: Path) -> None:
    """The same variables, arguments, streams and output, and rank 1's exit status."""
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    forked, real = (
        run_composer(2, script, "a b", "$HOME", env={"KEY": "value"}, check=False, forked=forked)
        for forked in (True, False)
    )
    assert forked.returncode == real.returncode == 3
    assert "'KEY': 'value'" in real.output and "'RANK': '1'" in real.output
    shown = [
        sorted(line for line in launch.output.splitlines() if line.startswith(("{", "[", "to stderr", "-----")))
        for launch in (forked, real)
    ]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 10  # three of each rank; the second's streams are between lines
