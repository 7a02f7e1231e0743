"""One training killed with SIGKILL twenty times, at random moments: its end is that of a training never stopped.

The command is `composer -n 1 recipe/train.py YAML`; most launches are forked from a process that has its imports done
(`fork_server.py`), since those would take nine tenths of the time. SIGKILL goes to the whole process group, and so to
the loader's workers too. Nothing in the run knows of the drill: when to kill is read off the files of the run.
"""

import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints.checkpoint_cases import flip, truncate
from tests.drills.drill_cases import EVALUATE_EVERY, SAVE_EVERY, STEPS
from tests.drills.drill_run import Run, assert_same_end
from tests.drills.launches import ForkServer, launch
from tests.drills.moments import CHECKPOINT, EVALUATION, START, STEP, Moment

KILLS_A_PHASE = 6
NUM_KILLS = 3 * KILLS_A_PHASE + 2
LONGEST_DELAY = {START: 2.0, STEP: 0.15, EVALUATION: 0.2, CHECKPOINT: 0.02}  # seconds from the beginning of a phase on

pytestmark = pytest.mark.slow


def plan_kills(rng: random.Random) -> list[Moment]:
    """So many of each phase, at random batches in order; the first ones before there is a checkpoint."""
    phases = (STEP, EVALUATION, CHECKPOINT)
    every = {STEP: 1, EVALUATION: EVALUATE_EVERY, CHECKPOINT: SAVE_EVERY}
    last = STEPS - 2 * EVALUATE_EVERY  # a phase that is missed comes again
    found = [
        Moment(phase, batch)
        for phase in phases
        for batch in rng.sample(range(every[phase], last + 1, every[phase]), KILLS_A_PHASE)
    ]
    found.sort(key=lambda moment: (moment.batch, phases.index(moment.phase)))
    return [Moment(START, 0), Moment(STEP, 1), *found[1:], Moment(START, 0)]


def test_killed_twenty_times(make_run: Callable[[str], Run], whole: Run, server: ForkServer, folder: Path) -> None:
    rng = random.Random(4)
    run = make_run("killed")
    for number, moment in enumerate(plan_kills(rng)):
        log = folder / f"killed-{number}.log"
        is_true = moment == Moment(STEP, 1) or number == NUM_KILLS // 2
        running = launch(1, run.yaml, log) if is_true else server.launch(run.yaml, log)
        run.kill(running, moment, rng.uniform(0, LONGEST_DELAY[moment.phase]))
    run.finish(launch(1, run.yaml, folder / "killed-last.log"))
    assert len(run.kills) == NUM_KILLS == 20
    hits = Counter(hit.phase for _, hit, _ in run.kills)
    assert min(hits[phase] for phase in (STEP, EVALUATION, CHECKPOINT)) >= 3
    assert hits[START] >= 1 and run.kills[1][2] == 0 and run.kills[-1][2] > 0
    assert_same_end(run, whole)


def test_newest_checkpoint_damaged_after_a_kill(
    make_run: Callable[[str], Run], whole: Run, server: ForkServer, folder: Path
) -> None:
    run = make_run("damaged")
    damages: dict[str, Callable[[Path], object]] = {
        "has [0-9]+ bytes instead of": truncate,
        "has another SHA-256": flip,
        "no manifest": lambda path: path.with_name(path.name + ".manifest.json").unlink(),
    }
    for number, damage in enumerate(damages.values()):
        run.kill(server.launch(run.yaml, folder / f"damaged-{number}.log"), Moment(STEP, 6 * number + 6), 0.0)
        newest = run.newest()
        path = run.checkpoints / f"ba{newest}.pt"
        shutil.copy(path, folder / "broken.pt")  # not the best one, which may be the same file by another name
        (folder / "broken.pt").replace(path)
        damage(path)
        assert 0 < run.newest() < newest
    run.finish(server.launch(run.yaml, folder / "damaged-last.log"))
    for number, reason in enumerate(damages):
        log = folder / f"damaged-{number + 1 if number < 2 else 'last'}.log"
        assert re.search(rf"ba{run.kills[number][2]}\.pt is skipped: .*{reason}", log.read_text()), reason
    assert_same_end(run, whole)
