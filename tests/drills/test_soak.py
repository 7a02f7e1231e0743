"""Check the soak: its schedule, and the command over three minutes and thirty."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.drills.soak_control import Control
from tests.drills.soak_faults import LEFT
from tests.drills.soak_schedule import (
    KINDS,
    LAST,
    LEAST_BETWEEN_NANS,
    MOST_WEIGHTS,
    PLACES,
    Planned,
    Schedule,
    draw_schedule,
)
from tests.support.s3_server import find_juicefs

ROOT = Path(__file__).resolve().parents[2]
MOST_MEMORY = 64  # MiB by which the ranks may grow beyond what the undisturbed run's do


@pytest.mark.parametrize("minutes", [3, 5, 30, 120])
@pytest.mark.parametrize("seed", range(5))
def test_a_schedule_holds_everything(seed: int, minutes: float) -> None:
    schedule = draw_schedule(seed, minutes)
    assert schedule == draw_schedule(seed, minutes) == Schedule.from_json(schedule.to_json())
    assert schedule != replace(draw_schedule(seed + 1, minutes), seed=seed)
    kinds = schedule.kinds()
    assert kinds.keys() == {*KINDS, *(f"nan_{place}" for place in PLACES)}
    counts = [kinds[kind] for kind in KINDS]
    assert max(counts) - min(counts) <= 1 and kinds["nan_weight"] <= MOST_WEIGHTS
    times = [fault.at for fault in schedule.faults]
    assert times == sorted(times) and times[-1] <= LAST * 60 * minutes
    batches = [nan.batch for nan in schedule.nans]
    assert all(later - earlier >= LEAST_BETWEEN_NANS for earlier, later in pairwise(batches))
    assert batches[-1] < schedule.batches


def test_a_kind_that_is_not_known_is_refused() -> None:
    schedule = replace(draw_schedule(1, 3), faults=[Planned(1.0, "flood", 0, 0.5)])
    with pytest.raises(ValueError, match=r"\['flood'\] are not known"):
        Schedule.from_json(schedule.to_json())


def test_the_clock_of_another_process(tmp_path: Path) -> None:
    control = Control.make(tmp_path / "control")
    control.clock_offset = 3600.0
    environment = {
        **os.environ,
        "SOAK_CONTROL": str(tmp_path / "control"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).with_name("inside")), str(ROOT)]),
    }
    code = "import time, datetime; print(time.time(), time.time_ns() / 1e9, datetime.datetime.now().timestamp())"
    before = time.time()
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert all(3600 <= float(seconds) - before < 3660 for seconds in shown.stdout.split())


def soak(minutes: float, seed: int) -> dict[str, Any]:
    """Return the command's report."""
    if find_juicefs() is None or subprocess.run(["unshare", "--map-root-user", "--mount", "true"]).returncode:
        pytest.skip("needs the juicefs program, and a system that gives namespaces")
    command = [sys.executable, "tests/drills/soak.py", "--minutes", str(minutes), "--seed", str(seed)]
    # Its own folder has a short path: in that of a test, sockets of the loader's workers would have too long ones.
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "minutes", [pytest.param(3, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.drill)]
)
def test_nothing_is_lost(minutes: float) -> None:
    report = soak(minutes, 1)
    schedule = draw_schedule(1, minutes)
    assert report["equal_weights"]
    assert not report["left_behind"], "a rank that is killed takes its processes with it"
    assert report["faults"] == dict(schedule.kinds()) and not report["not_injected"]
    assert report["skipped"] == [nan.batch for nan in schedule.nans if nan.is_skipped]
    assert report["rolled_back"] == [nan.batch for nan in schedule.nans if not nan.is_skipped]
    machine, ranks, calm = (report["leaks"][name] for name in ("machine", "ranks", "undisturbed"))
    assert machine["after"]["processes"] == machine["after"]["shared_memory"] == 0
    # What killed processes of others leave, some hundred bytes each, and what is for the next run.
    assert report["left_files"].keys() <= {*LEFT.values()} and report["left_mib"] < 1
    if ranks["before"] is not None:  # the last launch was long enough
        for what in ("files", "threads", "shared_memory"):
            assert ranks["after"][what] <= ranks["before"][what], what
        grown = [each["after"]["memory"] - each["before"]["memory"] for each in (ranks, calm)]
        assert grown[0] <= grown[1] + MOST_MEMORY
