"""Check `yamls/launch/`: what each file starts on each node, where signals go, when a job starts again; linters."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipe.configure import load_config
from tests.launches.launch import REPOSITORY

LAUNCH = REPOSITORY / "yamls" / "launch"
JOB = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
# In place of the launcher: two processes that end with 75 at SIGTERM; with STATUS it ends at once.
COMPOSER = """#!/usr/bin/env bash
echo "composer $*" >> "$LOG"
[ -z "${STATUS:-}" ] || exit "$STATUS"
trap 'echo "launcher SIGTERM" >> "$LOG"; exit 1' TERM
for _ in 0 1; do
  bash -c 'trap "echo rank SIGTERM >> $LOG; exit 75" TERM; echo ready >> $LOG; while :; do sleep 0.05; done' &
done
status=0
for process in $(jobs -p); do wait "$process" || status=$?; done
exit "$status"
"""
# In place of SLURM's: one task per node, one after the other; the greatest status.
SRUN = """#!/usr/bin/env bash
worst=0
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" || { status=$?; [ $status -le $worst ] || worst=$status; }; done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) printf 'first\\nsecond\\n' ;;
  *) echo "scontrol $*" >> "$LOG" ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which the programs above come first."""
    for name, text in (("composer", COMPOSER), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return {"PATH": path, "LOG": str(tmp_path / "log"), "TMPDIR": str(tmp_path)}


def lines(environment: Mapping[str, str]) -> list[str]:
    path = Path(environment["LOG"])
    return path.read_text().splitlines() if path.exists() else []


def test_a_schedulers_sigterm_reaches_the_ranks_but_not_the_launcher(environment: dict[str, str]) -> None:
    """It goes to the whole process group, as SLURM sends it."""
    settings = {"NODES": "2", "NODE_RANK": "1", "GPUS": "2", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    command = ["bash", str(LAUNCH / "node.sh"), "recipe/train.py", "a.yaml", "run_folder=x y"]
    process = subprocess.Popen(command, env={**environment, **settings}, start_new_session=True)
    until = time.monotonic() + 20
    while lines(environment).count("ready") < 2 and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(20) == 75
    started, *rest = lines(environment)
    places = "-n 2 --world_size 4 --node_rank 1 --base_rank 2 --master_addr first --master_port 29500"
    assert started == f"composer {places} recipe/train.py a.yaml run_folder=x y"
    assert sorted(rest) == ["rank SIGTERM"] * 2 + ["ready"] * 2


def test_a_node_without_its_number_is_refused(environment: dict[str, str]) -> None:
    settings = {"NODES": "2", "GPUS": "2", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    command = ["bash", str(LAUNCH / "node.sh"), "recipe/train.py"]
    found = subprocess.run(command, env={**environment, **settings}, capture_output=True, text=True)
    assert found.returncode != 0 and "NODE_RANK" in found.stderr and not lines(environment)


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [(0, 0, False), (2, 0, False), (65, 0, False), (75, 50, True), (1, 9, True), (137, 0, True), (1, 10, False)],
)
def test_slurm_starts_a_job_again_if_that_helps(
    environment: dict[str, str], status: int, restarts: int, again: bool
) -> None:
    settings = {"SLURM_JOB_NODELIST": "x[1-2]", "SLURM_JOB_ID": "20007", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    settings |= {"SLURM_RESTART_COUNT": str(restarts), "STATUS": str(status), "SLURM_TMPDIR": environment["TMPDIR"]}
    # The script looks for the packages in the folder of the job, where there are none of ours.
    script = (LAUNCH / "slurm.sh").read_text().replace('PATH="$PWD/.venv/bin:$PATH"', "")
    found = subprocess.run(
        ["bash", "-s", "yamls/joint_fsdp.yaml", "seed=1"],
        input=script,
        text=True,
        cwd=REPOSITORY,
        env={**environment, **settings},
    )
    assert found.returncode == status
    places = "-n 8 --world_size 16 --node_rank {} --base_rank {} --master_addr first --master_port 20007"
    expected = [
        f"composer {places.format(node, 8 * node)} recipe/train.py yamls/joint_fsdp.yaml seed=1" for node in (0, 1)
    ]
    assert lines(environment) == expected + ["scontrol requeue 20007"] * again


def test_the_pods_start_every_rank_once(environment: dict[str, str]) -> None:
    """With what the operator sets: RANK is the pod's number, and MASTER_PORT the port of that name."""
    replicas = JOB["spec"]["pytorchReplicaSpecs"]
    assert sum(entry["replicas"] for entry in replicas.values()) == 8 and replicas["Master"]["replicas"] == 1
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    [container] = replicas["Master"]["template"]["spec"]["containers"]
    [port] = container["ports"]
    assert (container["name"], port["name"]) == ("pytorch", "pytorchjob-port")
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (env["NODES"], env["GPUS"]) == ("8", container["resources"]["limits"]["nvidia.com/gpu"])
    given = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "joint-master-0", "MASTER_PORT": str(port["containerPort"])}
    command = [*container["command"], *container["args"]]
    subprocess.run(command, cwd=REPOSITORY, env={**env, **given, **environment, "STATUS": "0"}, check=True)
    places = "-n 8 --world_size 64 --node_rank 3 --base_rank 24 --master_addr joint-master-0 --master_port 29500"
    assert lines(environment) == [f"composer {places} recipe/train.py yamls/joint_fsdp.yaml"]


def test_the_files_and_their_yaml_agree_on_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 nodes of 8 GPUs in the yaml's header, in SLURM's file and in the manifest."""
    script = (LAUNCH / "slurm.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --(nodes|gpus-per-node)=(\d+)$", script, re.MULTILINE))
    assert asked == {"nodes": "8", "gpus-per-node": "8"}
    monkeypatch.setenv("WORLD_SIZE", "64")
    load_config(str(REPOSITORY / "yamls" / "joint_fsdp.yaml"))  # judges batch sizes and FSDP's degrees


@pytest.mark.slow
def test_shellcheck_finds_nothing() -> None:
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists():
        pytest.skip("no shellcheck: pip install '.[cluster]'")
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    assert len(scripts) == 2
    found = subprocess.run([program, *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.slow
def test_the_manifest_fits_the_schemas_of_kubernetes_and_kubeflow() -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="pip install '.[cluster]'")
    pytest.importorskip("kubeflow.training", reason="pip install '.[cluster]'")
    assert_fits(JOB, "KubeflowOrgV1PyTorchJob", "job")
    for name, entry in JOB["spec"]["pytorchReplicaSpecs"].items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}, "spec": entry["template"]["spec"]}
        kubernetes.validate(pod, "1.35", strict=True)


def assert_fits(value: Any, kind: str, where: str) -> None:
    """Assert that every key is one that the operator's model of its place has, and every value of the model's type."""
    kubeflow = pytest.importorskip("kubeflow.training.models")  # not in the dev extra, where types are checked
    kubernetes = pytest.importorskip("kubernetes.client").models
    if match := re.fullmatch(r"(?:dict\(str, (.*)\)|list\[(.*)\])", kind):
        for key, item in value.items() if match[1] else enumerate(value):
            assert_fits(item, match[1] or match[2], f"{where}.{key}")
    elif model := getattr(kubeflow, kind, None) or getattr(kubernetes, kind, None):
        types = {model.attribute_map[name]: found for name, found in model.openapi_types.items()}
        for key, item in value.items():
            assert key in types, f"{where}.{key} is not a key of {kind}"
            assert_fits(item, types[key], f"{where}.{key}")
    else:
        allowed: Any = {"str": str, "int": int, "bool": bool}.get(kind, object)
        assert isinstance(value, allowed), f"{where} is {value!r}, not of {kind}"
