"""Run the two trainings of a soak: one undisturbed, and one that is started again whenever it ends too early."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.drills.drill_cases import assert_same_training, write_data, write_yaml
from tests.drills.soak_control import FREE, Control
from tests.drills.soak_faults import (
    Level,
    Processes,
    Saboteur,
    files_below,
    is_of_a_run,
    level,
    median_level,
    processes_of,
    runs,
    whose,
)
from tests.drills.soak_schedule import Planned, Schedule
from tests.launches.launch import Running, end_hung, is_alive, start
from tests.support.s3_server import FaultProxy, S3Server
from tests.support.tiny_cases import build_checkpoint

BUCKET = "soak"
DISK_SIZE = "400m"
SAVE_EVERY, EVALUATE_EVERY = 5, 15  # batches
BOUNDS = ("timeout=10", "retry=2")  # of downloads in the disturbed run, so that it ends soon if the store is down
PATIENCE = 600.0  # seconds without a new batch since the launch began and no fault was active, which is a hang
SECONDS_TO_END = 3.0  # after the launcher: whatever still runs then is left behind
MOST_STARTS = 8  # without a new batch and without a fault since the first of them
SPEED_OF_START = 0.25  # of the schedule's clock, else most faults would meet a run that has not begun to train
WARM = EVALUATE_EVERY + 4  # batches after which a launch uses what it needs, the evaluation's workers too
SAMPLES = 5  # of a level, of which the median counts
SECONDS_TO_SETTLE = 31.0  # after which what a run left in shared memory is nobody's
DEADLY = ("kill_rank", "kill_launcher", "kill_loader_worker")
FINISHED = 999  # number of the launch after the last one
LOST = 65  # the status of a run that diverged


@dataclass(frozen=True)
class Machine:
    """Where both trainings run.

    Attributes:
        folder: Logs, the yaml, the store's files.
        disk: A file system of its own: the run folder, the cache of the data, temporary files.
        server: The store.
    """

    folder: Path
    disk: Path
    server: S3Server
    schedule: Schedule
    control: Control

    @classmethod
    def make(cls, folder: Path, server: S3Server, schedule: Schedule) -> "Machine":
        """Make the disk, the data in the store, the tiny model and the yaml."""
        disk = folder / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs", str(disk)], check=True)
        write_data(folder / "data", num_train=180, size_limit="60kb")
        server.upload(folder / "data", BUCKET, "scenes")
        write_yaml(folder / "soak.yaml", build_checkpoint(str(folder / "tiny")), folder / "data", schedule.batches)
        control = Control.make(folder / "control")
        # The process that launches are forked from has to have them at its own start.
        os.environ |= {
            "SOAK_CONTROL": str(folder / "control"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "inside"), os.environ["PYTHONPATH"]]),
        }
        return cls(folder, disk, server, schedule, control)

    @property
    def temporary(self) -> Path:
        """Return the temporary folder of the disturbed run."""
        return self.disk / "run" / "tmp"

    def launch(self, name: str, number: int, env: dict[str, str]) -> Running:
        """Start the command for the run of this name; its log is `NAME-NUMBER.log`.

        The first start of the disturbed run, each tenth one and the one after its end are the real command; others are
        forked from a process that has its imports done, which take most of a start.
        """
        home = self.disk / name
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        remote = f"s3://{BUCKET}/scenes"
        streams = ["train_loader.streams.train", "eval_loader.streams.val", "teachers.stream"]
        overrides = [f"{stream}.{key}" for stream in streams for key in (f"remote={remote}", f"local={home / 'cache'}")]
        if name != "undisturbed":
            loaders = ("train_loader", "eval_loader")
            overrides += [f"{loader}.dataset.download_{key}" for loader in loaders for key in BOUNDS]
        overrides += [
            f"run_folder={home / 'run'}",
            f"trainer.save_folder=s3://{BUCKET}/{name}/checkpoints",
            f"trainer.save_interval={SAVE_EVERY}ba",
            f"trainer.eval_interval={EVALUATE_EVERY}ba",
            "evaluation.answers=null",
            "train_loader.global_batch_size=2",
            "nan_rollback.quarantine_after=1000",  # a sample must not be excluded from one of the two runs only
            "train_loader.dataset.cache_limit=400kb",  # so that shards are fetched all the time
            "train_loader.dataset.predownload=8",
        ]
        own = {
            "TMPDIR": str(home / "tmp"),
            "SOAK_SCHEDULE": self.schedule.to_json(),
            "SOAK_LAUNCH": str(number),
            "SOAK_UNDISTURBED": str(int(name == "undisturbed")),
            "PYTHONPATH": os.environ["PYTHONPATH"],
        }
        log, forked = self.folder / f"{name}-{number}.log", name == "undisturbed" or number % 10 not in (0, 9)
        yaml = str(self.folder / "soak.yaml")
        return start(2, "recipe/train.py", yaml, *overrides, log=log, env={**env, **own}, forked=forked)

    def level(self) -> Level:
        """Return what is in use on the machine, this process and the store aside."""
        others = [process for process in psutil.process_iter() if is_of_a_run(process)]
        found = level(others, self.temporary)
        assert found is not None
        return found

    def level_at_end(self) -> tuple[Level, dict[str, Any]]:
        """Return the same after the command ran again, which has nothing to train and cleans up what was killed."""
        time.sleep(SECONDS_TO_SETTLE)
        running = self.launch("run", FINISHED, self.server.env)
        assert running.wait(PATIENCE) == 0 and "already ended" in running.output(), running.output()
        for segment in sorted(Path("/dev/shm").iterdir()):
            status = segment.stat()
            print(f"left in shared memory: {segment.name}, {time.time() - status.st_mtime:.0f} s old", file=sys.stderr)
        left = files_below(self.temporary)
        owners = Counter(whose(path, self.temporary) for path in left)
        size = sum(path.stat().st_size for path in left) / 2**20
        return self.level(), {"left_files": dict(owners), "left_mib": round(size, 3)}


@dataclass
class Used:
    """What the ranks of one launch used once they were warm, the first and the last few times that they were seen."""

    first: list[Level] = field(default_factory=list[Level])
    last: deque[Level] = field(default_factory=lambda: deque[Level](maxlen=SAMPLES))

    def note(self, processes: Processes, temporary: Path, num_batches: int) -> None:
        """Look at the ranks, if they train: with two workers each, not those of an evaluation too."""
        if num_batches < WARM or len(processes.loader_workers) != 4 or not processes.upload_workers:
            return
        found = level(processes.ranks, temporary)
        if found is not None and len(processes.ranks) == 2:
            if len(self.first) < SAMPLES:
                self.first.append(found)
            self.last.append(found)

    def levels(self) -> dict[str, Level | None]:
        """Return the levels for the report."""
        return {"before": median_level(self.first), "after": median_level(list(self.last))}


def train_undisturbed(machine: Machine) -> tuple[Used, float]:
    """Run the whole training at full speed; return what it used, and its seconds."""
    machine.control.allowed = FREE
    used, began = Used(), time.monotonic()
    running = machine.launch("undisturbed", 0, machine.server.env)
    while (status := ended(running)) is None:
        used.note(processes_of(running.group), machine.disk / "undisturbed" / "tmp", machine.control.batch(0) or 0)
        time.sleep(0.5)
    assert status == 0, running.output()
    shutil.rmtree(machine.disk / "undisturbed")
    return used, time.monotonic() - began


def ended(running: Running) -> int | None:
    """Return the exit status of a launch, while other processes of it may live; None: it has not ended."""
    if not running.is_forked:
        return running.process.poll()
    lines = running.process.stdout
    assert lines is not None
    if select.select([lines], [], [], 0)[0] or not psutil.pid_exists(running.group):
        return int(lines.readline())
    return None


def kind_of(process: psutil.Process) -> str:
    """Return the kind of a process, for a count."""
    if runs(process, "spawn_main") or runs(process, "resource_tracker"):
        return "spawned by a rank"
    return "loader worker" if process.name() == "pt_data_worker" else "rank"


@dataclass
class Launch:
    """One start of the disturbed training."""

    running: Running
    number: int
    first_batch: int | None = None
    last_batch: int = 0
    status: int | None = None
    faults: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])  # seconds, kind
    used: Used = field(default_factory=Used)

    def cause(self) -> str | None:
        """Return the kind of fault that probably ended it: the last kill, if within the last minute, else the last."""
        if not self.faults:
            return None
        recent = [kind for at, kind in self.faults if at > self.faults[-1][0] - 60]
        return next((kind for kind in reversed(recent) if kind in DEADLY), recent[-1])


class Supervisor:
    """Starts the training again until it has ended with 0, while faults happen."""

    def __init__(self, machine: Machine, proxy: FaultProxy):
        self.machine, self.schedule, self.control = machine, machine.schedule, machine.control
        self.env = proxy.env
        self.saboteur = Saboteur(proxy, machine.control, machine.disk)
        self.launches: list[Launch] = []
        self.due = list(self.schedule.faults)
        self.injected: list[str] = []
        self.ended: Counter[str] = Counter()  # kinds after which the launch ended
        self.left_behind: Counter[str] = Counter()  # kinds of processes that were alive after their launcher had failed
        self.orphans: list[int] = []  # groups of which the launcher has ended
        self.began = self.moved = self.looked = time.monotonic()
        self.now = 0.0  # of the schedule

    def run(self) -> None:
        """Start, wait, start again."""
        self.machine.temporary.mkdir(parents=True, exist_ok=True)
        self.control.note_batch(-1, 0)  # the undisturbed run has ended
        while True:
            launch = Launch(self.machine.launch("run", len(self.launches), self.env), len(self.launches))
            self.launches.append(launch)
            self.moved = time.monotonic()
            while (status := ended(launch.running)) is None:
                self._tick(launch)
                time.sleep(0.1)
            launch.status = status
            time.sleep(SECONDS_TO_END if launch.status else 0)
            print(
                f"{self.now:7.1f} s  launch {len(self.launches) - 1} ended with {launch.status} at batch "
                f"{launch.last_batch}",
                file=sys.stderr,
                flush=True,
            )
            if launch.status == 0:
                break
            self._judge(launch)
        self.saboteur.end(float("inf"))
        self._end_orphans()

    def _tick(self, launch: Launch) -> None:
        looked, batch = time.monotonic(), self.control.batch(launch.number)
        self.now += (looked - self.looked) * (SPEED_OF_START if batch is None else 1.0)
        self.looked = looked
        now, schedule = self.now, self.schedule
        self.control.allowed = (
            FREE if now > 60 * schedule.minutes else int(1 + schedule.batches * now / (60 * schedule.minutes))
        )
        processes = processes_of(launch.running.group)
        self.saboteur.end(looked)
        for fault in [each for each in self.due if each.at <= now]:
            hit = self.saboteur.begin(fault, processes, looked)
            if hit is not None:
                self._note(fault, launch, hit)
        if batch is not None:
            if launch.first_batch is None:
                launch.first_batch = batch
            if batch > launch.last_batch:
                launch.last_batch, self.moved = batch, time.monotonic()
            if not self.saboteur.active:
                launch.used.note(processes, self.machine.temporary, batch - launch.first_batch)
        if self.saboteur.active:
            self.moved = time.monotonic()
        if time.monotonic() - self.moved > PATIENCE:
            end_hung(launch.running.group)
            raise AssertionError(f"no new batch for {PATIENCE:g} s without a fault:\n{launch.running.output()}")

    def _note(self, fault: Planned, launch: Launch, hit: str) -> None:
        self.due.remove(fault)
        self.injected.append(fault.kind)
        launch.faults.append((self.now, fault.kind))
        print(f"{self.now:7.1f} s  {fault.kind}: {hit}, at batch {launch.last_batch}", file=sys.stderr, flush=True)

    def _judge(self, launch: Launch) -> None:
        """Judge an end that was not the last."""
        assert launch.status != LOST, f"the training has diverged:\n{launch.running.output()}"
        if (cause := launch.cause()) is not None:
            self.ended[cause] += 1
        # As SLURM, systemd and Kubernetes do, but only after the next start was refused because the ranks still live.
        self._end_orphans()
        if is_alive(launch.running.group):
            self.orphans.append(launch.running.group)
            if cause != "kill_launcher":
                self.left_behind += Counter(kind_of(each) for each in psutil.process_iter() if is_of_a_run(each))
        idle = [each for each in self.launches[-MOST_STARTS:] if each.first_batch is None and not each.faults]
        assert len(idle) < MOST_STARTS, f"{MOST_STARTS} starts in vain:\n{launch.running.output()}"

    def _end_orphans(self) -> None:
        while self.orphans:
            with suppress(ProcessLookupError):
                os.killpg(self.orphans.pop(), signal.SIGKILL)

    def injected_nans(self) -> Counter[str]:
        """Return the NaNs by place; the audit says which the guard saw."""
        return Counter(f"nan_{nan.place}" for nan in self.schedule.nans)

    def outcomes(self) -> dict[str, dict[str, int]]:
        """Return, by kind, after how many the launch ended before the next one, and after how many it did not."""
        every = Counter(self.injected)
        return {
            kind: {"ended": self.ended[kind], "continued": every[kind] - self.ended[kind]} for kind in sorted(every)
        }

    def not_injected(self) -> Counter[str]:
        """Return the kinds of faults that the training did not live to see."""
        return Counter(fault.kind for fault in self.due)

    def batches_done_twice(self) -> int:
        """Return the batches that were done twice or more often."""
        begun = [launch for launch in self.launches if launch.first_batch is not None]
        return sum(launch.last_batch - (launch.first_batch or 0) + 1 for launch in begun) - self.schedule.batches

    def audit(self) -> dict[str, list[int]]:
        """Return the batches that the guard reports, each once although some were done again."""
        lines = (self.machine.disk / "run" / "run" / "quarantine.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return {
            name: sorted({entry["batch"] for entry in entries if entry["action"] == action})
            for name, action in (("skipped", "skip"), ("rolled_back", "rollback"))
        }

    def survived(self) -> dict[str, int]:
        """Return what the last launch survived, by kind."""
        return dict(Counter(kind for _, kind in self.launches[-1].faults))


def same_end(machine: Machine) -> list[str]:
    """Return how the last checkpoints of the two trainings differ; [] if they do not, and hold only finite weights."""
    store, name = machine.server.client(), f"ba{machine.schedule.batches}.pt"
    paths = []
    for run in ("run", "undisturbed"):
        paths.append(machine.folder / f"{run}-{name}")
        store.download_file(BUCKET, f"{run}/checkpoints/{name}", str(paths[-1]))
    weights = torch.load(paths[0], weights_only=False)["state"]["model"]
    bad = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        return [f"{len(bad)} weights are not finite: {bad[:3]}"]
    try:
        assert_same_training(*paths)
    except AssertionError as error:
        return [str(error)]
    return []
