"""Set up machines of a cluster on this one, for `composer --node_rank`: what each has for itself, and what they share.

Each has a disk (home, temporary folder, working directory). As root on Linux each also has namespaces of its own: a
network with one address, /dev/shm, processes, a host name, a clock since boot. At the same path each sees its own disk.
Elsewhere they share all of these but the disk, and meet on loopback.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.launches.launch import REPOSITORY, Running, settings
from tests.support.ports import free_port
from tests.support.s3_server import S3Server, s3_server

NETWORK = "10.78.0."  # the nodes are 1, 2, ...; this machine is 254
SPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--time")
AHEAD = 600.0  # seconds by which the clock of node 1 is ahead; a store refuses more than 900
CLOCK = f"import time\n_clock = time.time\ntime.time = lambda: _clock() + {AHEAD}\n"


@dataclass
class Node:
    """One machine.

    Attributes:
        rank: Its number.
        disk: Its folder, as this machine sees it; it holds `home`, `tmp` and what a launch writes.
        seen_as: The path of its disk inside.
        address: Of its network.
        enter: The command that runs another one inside.
        interface: Of its network.
    """

    rank: int
    disk: Path
    seen_as: Path
    address: str = "127.0.0.1"
    enter: list[str] = field(default_factory=list[str])
    interface: str = "lo"

    def wipe(self) -> None:
        """Empty the disk, as that of a machine which takes the place of a broken one."""
        for path in self.disk.glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("home", "tmp", "site"):
            (self.disk / name).mkdir()
        if self.rank == 1:
            # The kernel has one clock of the day for all namespaces.
            (self.disk / "site" / "sitecustomize.py").write_text(CLOCK)

    def start(self, command: list[str], env: Mapping[str, str], log: Path) -> Running:
        """Run a command inside, in a process group of its own."""
        own = {"HOME": "home", "TMPDIR": "tmp"}
        environment = {
            **settings(),
            **{name: str(self.seen_as / folder) for name, folder in own.items()},
            "PYTHONPATH": f"{self.seen_as / 'site'}{os.pathsep}{settings()['PYTHONPATH']}",
            "GLOO_SOCKET_IFNAME": self.interface,
            **env,
        }
        started = time.time()
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self.enter, *command],
                cwd=self.disk,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        return Running(" ".join(command), process.pid, process, log, started, is_forked=False)


@dataclass
class Cluster:
    """Machines with a store, which is all that they share.

    Attributes:
        nodes: By rank.
        store: An S3 server.
        isolated: Whether the nodes have namespaces.
    """

    nodes: list[Node]
    store: S3Server
    isolated: bool

    def launch(self, name: str, num_nodes: int, script: str, *arguments: str) -> list[Running]:
        """Start `yamls/launch/node.sh SCRIPT ARGUMENTS`, and so `composer -n 2 --node_rank R ...`, on the first nodes.

        Args:
            name: Of the logs, next to the disks.
            num_nodes: That take part, with two ranks each.
            script: Relative to the repository.
            arguments: Of the script; a relative path is on each node's own disk.
        """
        port = 29500 if self.isolated else free_port()
        env = {"NODES": str(num_nodes), "GPUS": "2", "MASTER_ADDR": self.nodes[0].address, "MASTER_PORT": str(port)}
        env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **self.store.env}
        command = ["bash", str(REPOSITORY / "yamls/launch/node.sh"), str(REPOSITORY / script), *arguments]
        return [
            node.start(command, {**env, "NODE_RANK": str(node.rank)}, node.disk.parent / f"{name}-{node.rank}.log")
            for node in self.nodes[:num_nodes]
        ]


def can_isolate() -> bool:
    """Return whether this process may make namespaces and connect their networks."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    probe = "ip link add rprobe type bridge && ip link del rprobe && mount -t tmpfs none /dev/shm"
    command = ["unshare", *SPACES, "--fork", "--mount-proc", "sh", "-c", probe]
    return subprocess.run(command, capture_output=True).returncode == 0


@contextmanager
def cluster(folder: Path, num_nodes: int = 2) -> Iterator[Cluster]:
    """Set up nodes with empty disks in `folder`, and a store; their processes and namespaces end with it."""
    isolated = can_isolate()
    disks = [folder / f"disk-{rank}" for rank in range(num_nodes)]
    nodes = [Node(rank, disk, folder / "disk" if isolated else disk) for rank, disk in enumerate(disks)]
    (folder / "disk").mkdir()
    with ExitStack() as stack:
        host = stack.enter_context(_bridge()) if isolated else "127.0.0.1"
        for node in nodes:
            node.disk.mkdir()
            node.wipe()
            if isolated:
                stack.enter_context(_namespaces(node))
        (folder / "store").mkdir()
        yield Cluster(nodes, stack.enter_context(s3_server(folder / "store", host)), isolated)


@contextmanager
def _bridge() -> Iterator[str]:
    """Make the switch that connects the nodes with this machine; yield this machine's address."""
    name, address = f"rb{os.getpid()}", f"{NETWORK}254"
    _run("ip", "link", "add", name, "type", "bridge")
    try:
        _run("ip", "addr", "add", f"{address}/24", "dev", name)
        _run("ip", "link", "set", name, "up")
        yield address
    finally:
        _run("ip", "link", "del", name)


@contextmanager
def _namespaces(node: Node) -> Iterator[None]:
    """Hold the node's namespaces by a process in them, with which they end."""
    inside = (
        f"mount -t tmpfs none /dev/shm && mount --bind {node.disk} {node.seen_as} && hostname node-{node.rank} && "
        "ip link set lo up && echo ready && exec sleep infinity"
    )
    uptime = ["--boottime", str(86_400 * (node.rank + 1)), "--monotonic", str(86_400 * (node.rank + 1))]
    command = ["unshare", *SPACES, *uptime, "--fork", "--mount-proc", "--kill-child", "sh", "-c", inside]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        outside = f"rv{os.getpid()}n{node.rank}"
        node.address, node.interface = f"{NETWORK}{node.rank + 1}", "eth0"
        node.enter = ["nsenter", "--target", children[0], *SPACES, f"--wdns={node.seen_as}", "--"]
        _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", children[0])
        _run("ip", "link", "set", outside, "master", f"rb{os.getpid()}", "up")
        for arguments in (["addr", "add", f"{node.address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            _run("nsenter", "--target", children[0], "--net", "ip", *arguments)
        yield
    finally:
        holder.kill()
        holder.wait()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
