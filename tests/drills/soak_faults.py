"""Do to a running training what a schedule says: to its processes, its store, its disk and its clock."""

import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from statistics import median

import psutil

from tests.drills.soak_control import Control
from tests.drills.soak_schedule import Planned
from tests.launches.launch import fork_server
from tests.support.s3_server import Fault, FaultProxy

HOUR = 3600.0
LEFT_FREE = 4096  # bytes, on the full disk


@dataclass
class Processes:
    """The processes of one launch.

    Attributes:
        launcher: Of `composer`.
        ranks: In the order of their start.
        loader_workers: Forked by the ranks.
        upload_workers: Spawned by rank 0.
    """

    launcher: list[psutil.Process] = field(default_factory=list[psutil.Process])
    ranks: list[psutil.Process] = field(default_factory=list[psutil.Process])
    loader_workers: list[psutil.Process] = field(default_factory=list[psutil.Process])
    upload_workers: list[psutil.Process] = field(default_factory=list[psutil.Process])


def processes_of(launcher: int) -> Processes:
    """Return those alive now of the launch whose launcher has this id."""
    found = Processes()
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(launcher)
        found.launcher = [parent]
        found.ranks = sorted(parent.children(), key=lambda each: each.pid)
    for rank in found.ranks:
        with suppress(psutil.NoSuchProcess):
            children = sorted(rank.children(), key=lambda each: each.create_time())
            found.loader_workers += [child for child in children if child.name() == "pt_data_worker"]
            found.upload_workers += [child for child in children if runs(child, "spawn_main")]
    return found


def runs(process: psutil.Process, text: str) -> bool:
    """Return whether its command line holds a text."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return any(text in argument for argument in process.cmdline())
    return False


@dataclass
class Saboteur:
    """Begins and ends faults.

    Attributes:
        disk: A file system of its own, which holds what the run writes; it is filled by a file.
    """

    proxy: FaultProxy
    control: Control
    disk: Path
    active: list[tuple[float, Planned, psutil.Process | None]] = field(default_factory=list)  # with their ends

    def begin(self, fault: Planned, processes: Processes, now: float) -> str | None:
        """Begin a fault that is due; return what it hit, or None if there is no such process yet."""
        groups = {
            "kill_rank": processes.ranks,
            "stop_rank": processes.ranks,
            "kill_launcher": processes.launcher if processes.ranks else [],
            "kill_loader_worker": processes.loader_workers,
            "kill_upload_worker": processes.upload_workers,
        }
        target = None
        if fault.kind in groups:
            group = groups[fault.kind]
            if not group:
                return None
            target = group[int(fault.draw * len(group))]
            with suppress(psutil.NoSuchProcess):
                target.send_signal(signal.SIGSTOP if fault.kind == "stop_rank" else signal.SIGKILL)
        if fault.seconds:
            self.active.append((now + fault.seconds, fault, target))
            self._apply()
        return f"process {target.pid}" if target else fault.kind

    def end(self, now: float) -> None:
        """End the faults whose time is over."""
        over = [each for each in self.active if each[0] <= now]
        self.active = [each for each in self.active if each[0] > now]
        for _, _, target in over:
            if target is not None:
                with suppress(psutil.NoSuchProcess):
                    target.send_signal(signal.SIGCONT)
        if over:
            self._apply()

    def _apply(self) -> None:
        """Make store, disk and clock what the active faults say."""
        active = {fault.kind: fault for _, fault, _ in self.active}
        faults = []
        if "store_503" in active:
            faults.append(Fault("status", status=503))
        if "store_truncates" in active:
            faults.append(Fault("truncate" if active["store_truncates"].draw < 0.5 else "cut"))
        if "store_slow" in active:
            faults.append(Fault("delay", seconds=3.0))
        self.proxy.faults = faults
        is_up = self.proxy.is_accepting
        if ("store_down" in active) == is_up:
            self.proxy.refuse() if is_up else self.proxy.accept()
        fill(self.disk, "disk_full" in active)
        ahead = active.get("clock_jump")
        self.control.clock_offset = 0.0 if ahead is None else HOUR if ahead.draw < 0.5 else -HOUR


def fill(disk: Path, is_full: bool) -> None:
    """Leave next to nothing free on a disk, or give it back."""
    ballast = disk / "ballast"
    if not is_full:
        ballast.unlink(missing_ok=True)
    elif not ballast.exists():
        with ballast.open("wb") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - LEFT_FREE))


@dataclass(frozen=True)
class Level:
    """What is in use: by the ranks of a run, or on the machine.

    Attributes:
        memory: MiB, resident.
        files: Open ones.
        shared_memory: Files in /dev/shm.
        threads: Of these processes.
        temporary_files: In the temporary folder, at any depth.
        processes: Of the run, whatever they do.
    """

    memory: int
    files: int
    shared_memory: int
    threads: int
    temporary_files: int
    processes: int


def level(processes: Sequence[psutil.Process], temporary: Path) -> Level | None:
    """Return the level of these processes and all that they made; None if one has ended meanwhile."""
    try:
        memory = sum(process.memory_info().rss for process in processes) // 2**20
        files, threads = (sum(getattr(process, name)() for process in processes) for name in ("num_fds", "num_threads"))
    except psutil.Error:
        return None
    shared = sum(1 for _ in Path("/dev/shm").iterdir())
    number = sum(1 for process in psutil.process_iter() if is_of_a_run(process))
    return Level(memory, files, shared, threads, len(files_below(temporary)), number)


def is_of_a_run(process: psutil.Process) -> bool:
    """Return whether a process was started by one of the trainings."""
    with suppress(psutil.Error):
        is_ours = "SOAK_CONTROL" in process.environ() and process.pid != fork_server().pid
        return is_ours and process.status() != psutil.STATUS_ZOMBIE
    return False


# {pattern: whose it is}: temporary files that stay after a kill and are small, or are for the next run.
LEFT: Mapping[str, str] = {
    "recipe-plans-*/*": "plans, for the next run",
    "*lock": "locks of Streaming and the recipe",
    "tmp*/_remote_module_non_scriptable.py": "torch, one per killed rank",
    "pymp-*/listener-*": "multiprocessing, one per killed rank",
    "tmp*/rank*.std*.txt": "Composer's launcher, two per killed one",
    "tmp*/[0-9].std*": "the tests' launcher, two per killed one",
}


def whose(path: Path, temporary: Path) -> str:
    """Return the owner of a file by `LEFT`, or the file's own path."""
    name = str(path.relative_to(temporary))
    return next((owner for pattern, owner in LEFT.items() if fnmatch(name, pattern)), name)


def files_below(folder: Path) -> list[Path]:
    """Return the files at any depth, while others may remove some."""
    return [Path(above, name) for above, _, names in os.walk(folder) for name in names]


def median_level(levels: Sequence[Level]) -> Level | None:
    """Return the median of each attribute; None if there are no levels."""
    if not levels:
        return None
    return Level(**{part.name: round(median(getattr(each, part.name) for each in levels)) for part in fields(Level)})
