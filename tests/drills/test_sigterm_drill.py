"""Send SIGTERM to all processes of a run at once, the loader's workers too, as SLURM and systemd send it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recipe.checkpoints.sigterm import PREEMPTED
from tests.drills.drill_cases import write_yaml
from tests.drills.drill_run import Run, assert_same_end
from tests.drills.moments import CHECKPOINT, EVALUATION, START, STEP, Moment, unfinished


@pytest.mark.slow
def test_terminated_in_every_phase(make_run: Callable[[str], Run], whole: Run) -> None:
    """Before the first batch, then five times on the way: each launch ends with 75 and its batch saved."""
    run = make_run("terminated")
    moments = [Moment(START, 0), Moment(STEP, 1), Moment(EVALUATION, 6), Moment(CHECKPOINT, 10), Moment(STEP, 15)]
    saved = [0]
    for number, moment in enumerate(moments):
        running = run.launch(f"terminated-{number}")
        status = run.terminate(running, moment, times=2 if moment == moments[-1] else 1)
        assert status == PREEMPTED, f"{moment}: {running.output()}"
        assert not unfinished(run.checkpoints)
        saved.append(run.newest())
        print(f"SIGTERM at {moment}: batch {saved[-1]} is saved")
        assert moment.phase == START or saved[-1] >= max(moment.batch - 1, saved[-2] + 1)
    run.finish(run.launch("terminated-last"))
    assert_same_end(run, whole)


@pytest.mark.drill
@pytest.mark.world_size(2)
def test_two_ranks_and_their_launcher_terminated(tiny_checkpoint: str, folder: Path) -> None:
    whole, run = (
        Run(write_yaml(folder / f"{name}.yaml", tiny_checkpoint, folder / "data", steps=8))
        for name in ("whole-2", "terminated-2")
    )
    whole.finish(whole.launch("whole-2", 2))
    running = run.launch("terminated-2", 2, forked=False)
    assert run.terminate(running, Moment(STEP, 4)) == PREEMPTED, running.output()
    assert 3 <= run.newest() < 8
    run.finish(run.launch("terminated-2-last", 2))
    assert_same_end(run, whole)
