"""Run one training through random faults, started again after each death; print one line of JSON at the end.

    python tests/drills/soak.py --minutes N --seed S [--replay FILE] [--keep FOLDER]

The tiny model is trained by `composer -n 2 recipe/train.py`; data and checkpoints are in an S3 server on loopback.
It runs first without faults, then again from the start while the schedule of the seed is carried out. Its faults are
SIGKILL to a rank, the launcher, a loader's worker or an uploading process; SIGSTOP for 20 s; the store down, slow,
answering 503 or half; the disk full; the clock an hour off; and NaNs. If the training ends before its last batch it is
started again by the same command, as a user's launcher does. Most starts are forked from a process that has its imports
done. At the end weights, optimizer and clock must be those of the undisturbed run to the last bit. Its NaNs differ: the
batches that the guard must skip have none and are left out without the guard. Weights that become NaN, after which the
guard rolls back and lowers the rates for good, do so there too.

The schedule is one line of the output; `--replay` takes a file with it. `FOLDER` keeps logs. The run is held back to
last as long as its schedule, whose clock runs slowly while it starts. It catches up at full speed after a fault.
Everything runs in namespaces of its own (`unshare`, of Linux): of processes, so that none outlives the command; of
mounts, for a disk that can be full and a /dev/shm that nobody else uses. The clock is shifted in Python
(`inside/sitecustomize.py`): torch's own timeouts and the times of files do not move.

The JSON: `faults`, by kind; `outcomes`, by kind, where the training ended or continued; `not_injected`; `launches`,
with the batch where each began and ended, and its status; `batches_done_twice`; `hours`; `equal_weights`; `skipped` and
`rolled_back` batches; `left_behind`, processes that were alive after their launcher had failed; `left_files`, temporary
ones at the end, by owner, and `left_mib`; `survived_by_last_launch`, its faults; and `leaks`: `machine`, before the
first start and after the end; `undisturbed` and `ranks`, the processes of the undisturbed run and of the last launch,
when they are warm and at their end.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "SOAK_INSIDE"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of the run with faults; default %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path, metavar="FILE", help="a schedule that an earlier soak printed")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where logs stay; must not exist")
    args = parser.parse_args()
    if args.minutes < 1:
        parser.error(f"--minutes is {args.minutes:g}: give 1 or more, so that every kind of fault has its turn")
    return args


def enter_namespaces() -> None:
    """Start this command again in namespaces of its own; their first process is a shell, which collects orphans."""
    space = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    space += [] if os.getuid() == 0 else ["--map-root-user"]
    shell = ["sh", "-c", 'mount -t tmpfs -o size=1g tmpfs /dev/shm && "$@"; exit $?', "sh"]
    environment = {**os.environ, INSIDE: "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")])}
    os.execvpe(space[0], [*space, *shell, sys.executable, *sys.argv], environment)


def main() -> int:
    """Run the soak; return 0 if nothing is lost."""
    args = parse()
    if INSIDE not in os.environ:
        enter_namespaces()
    # Imported here because they take seconds: a mistake in the command line is reported before.
    from tests.drills.soak_faults import Level
    from tests.drills.soak_run import Machine, Supervisor, same_end, train_undisturbed
    from tests.drills.soak_schedule import Schedule, draw_schedule
    from tests.support.s3_server import FaultProxy, s3_server

    schedule = Schedule.from_json(args.replay.read_text()) if args.replay else draw_schedule(args.seed, args.minutes)
    print(schedule.to_json(), flush=True)
    with ExitStack() as stack:
        if args.keep is not None:
            args.keep.mkdir(parents=True)
        folder = args.keep or Path(stack.enter_context(TemporaryDirectory(prefix="soak-")))
        (folder / "store").mkdir()
        server = stack.enter_context(s3_server(folder / "store"))
        machine = Machine.make(folder, server, schedule)
        stack.callback(subprocess.run, ["umount", "--lazy", str(machine.disk)], check=True)  # else it cannot be removed
        undisturbed, undisturbed_seconds = train_undisturbed(machine)
        proxy = stack.enter_context(FaultProxy(server.endpoint))
        supervisor = Supervisor(machine, proxy)
        before = machine.level()
        began = time.monotonic()
        supervisor.run()
        hours = (time.monotonic() - began) / 3600
        differences = same_end(machine)
        print("\n".join(differences) or "equal weights", file=sys.stderr, flush=True)
        after, left = machine.level_at_end()
        audit = supervisor.audit()
    levels: dict[str, dict[str, Level | None]] = {
        "machine": {"before": before, "after": after},
        "undisturbed": undisturbed.levels(),
        "ranks": supervisor.launches[-1].used.levels(),
    }
    report = {
        "seed": schedule.seed,
        "minutes": schedule.minutes,
        "batches": schedule.batches,
        "faults": dict(sorted((Counter(supervisor.injected) + supervisor.injected_nans()).items())),
        "outcomes": supervisor.outcomes(),
        "not_injected": dict(supervisor.not_injected()),
        "launches": [[launch.first_batch, launch.last_batch, launch.status] for launch in supervisor.launches],
        "left_behind": dict(supervisor.left_behind),
        "survived_by_last_launch": supervisor.survived(),
        "batches_done_twice": supervisor.batches_done_twice(),
        "hours": round(hours, 3),
        "undisturbed_hours": round(undisturbed_seconds / 3600, 3),
        **audit,
        **left,
        "equal_weights": not differences,
        "leaks": {
            name: {when: asdict(found) if found else None for when, found in pair.items()}
            for name, pair in levels.items()
        },
    }
    print(json.dumps(report))
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
