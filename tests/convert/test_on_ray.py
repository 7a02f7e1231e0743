"""Conversions on a Ray cluster: the bytes of a local one, whatever dies meanwhile."""

import builtins
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import Slow, picture, run_main
from test_store_s3 import SCENES, fetch

from convert import lease
from convert.items import BadRecord, Found
from convert.parts import Job
from convert.remote import RemotePath, address_of, input_path
from convert.store import staging_folder
from convert.write import convert_split
from tests.support.s3_server import S3Server

MACHINE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
ON_RAY: dict[str, Any] = {"part_records": 2, "engine": "ray"}


def argue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, *more: object) -> str:
    """What `convert.shapes` refuses."""
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, "shapes", "--split", "a", "--num-samples", 2, "--seed", 1, *more)
    return str(ended.value)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--out", "OUT", "--engine", "ray"], "--engine ray writes to an object store: --out OUT is a folder"),
        (["--out", "s3://b/x", "--engine", "ray", "--val-share", "0.5"], "set val_fraction in training"),
        (["--out", "s3://b/x", "--engine", "ray", "--num-workers", "99"], "--num-workers has no effect"),
        (["--out", "OUT", "--address", "head:1"], "--address head:1 has no effect without --engine ray"),
    ],
)
def test_what_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, more: list[str], reason: str
) -> None:
    assert reason in argue(monkeypatch, capsys, tmp_path, *more)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from convert.on_ray import connect

    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(ValueError, match=r"^--engine ray needs Ray: pip install '.\[ray\]', on every machine"):
        connect("auto")


def test_addresses_of_images() -> None:
    root = "s3://bucket/images"
    assert str(input_path(root)) == root and isinstance(input_path(root), RemotePath)
    assert str(input_path(root) / "a b.jpg") == f"{root}/a b.jpg"
    assert not isinstance(input_path("images"), RemotePath)
    assert address_of(root, "x\\./a.jpg") == f"{root}/x/a.jpg"
    for name, reason in (("../a", "leaves"), ("", "leaves"), ("/a", "absolute"), ("s3://other/a", "absolute")):
        with pytest.raises(BadRecord, match=reason):
            address_of(root, name)


@pytest.fixture
def address(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(lease, "SETTLE", 0.1)
    (tmp_path / "empty").mkdir()
    s3.upload(tmp_path / "empty", "converted")
    return f"s3://converted/{request.node.name}"


@pytest.fixture
def cluster(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One machine, of `MACHINE`; the environment of `address` is its."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parents[1]}")  # what is installed on real machines
    one = Cluster(initialize_head=True, head_node_args={**MACHINE, "include_dashboard": False})
    try:
        yield one
    finally:
        import ray

        ray.shutdown()
        one.shutdown()


def write_locally(tmp_path: Path, found: Found) -> dict[str, bytes]:
    convert_split(found, str(tmp_path / "local"), "train", part_records=2)
    folder = tmp_path / "local" / "train"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.drill
def test_a_machine_is_lost_and_the_command_too(
    cluster: Any, s3: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine goes in the middle of its part; then the store fails; the same command continues and ends the same."""
    scenes = SCENES * 2
    scenes = [type(scene)(1, number, 56) for number, scene in enumerate(scenes)]  # 24: 12 parts
    expected = write_locally(tmp_path, Found(scenes))
    slow = Found([Slow(scene, 0.25) for scene in scenes])
    staging, second = staging_folder(f"{address}/train"), cluster.add_node(**MACHINE)

    def lose() -> None:
        while not list(staging.glob("000??/part.json")):
            time.sleep(0.02)
        cluster.remove_node(second, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the command is killed"):
        patch.setattr("convert.parts.merge_parts", fail)
        convert_split(slow, address, "train", address=cluster.address, **ON_RAY)
    thread.join()
    assert len(list(staging.glob("000??/part.json"))) == 12, "also those of the lost machine"
    (staging / "00003" / "part.json").unlink()
    assert "index.json" not in fetch(s3, address)
    cluster.add_node(**MACHINE)
    summary = convert_split(slow, address, "train", address=cluster.address, **ON_RAY)
    assert (summary.kept, summary.parts) == (11, 12)
    assert fetch(s3, address) == expected
    assert not staging.exists()


def fail(job: Job) -> None:
    raise OSError("the command is killed")


@pytest.mark.slow
def test_all_from_the_store(
    cluster: Any,
    s3: S3Server,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`python -m convert.jsonl` with annotations and images at addresses, one image missing."""
    (tmp_path / "in" / "images").mkdir(parents=True)
    lines = []
    for number in range(5):
        if number != 3:
            (tmp_path / "in" / "images" / f"{number}.jpg").write_bytes(picture((20 + number, 10)))
        objects = [{"bbox_2d": [1, 2, 15, 9], "desc": f"thing {number}"}]
        lines.append(json.dumps({"images": [f"{number}.jpg"], "objects": objects}))
    (tmp_path / "in" / "train.jsonl").write_text("\n".join(lines))
    given = s3.upload(tmp_path / "in", "given")
    arguments = ("--annotations", f"{given}/train.jsonl", "--images", f"{given}/images", "--split", "train")
    run_main(monkeypatch, "jsonl", *arguments, "--out", address, "--engine", "ray", "--address", cluster.address)
    shown = capsys.readouterr().out
    assert "samples          4" in shown and "missing file" in shown
    run_main(monkeypatch, "jsonl", *arguments, "--out", tmp_path / "local")
    folder = tmp_path / "local" / "train"
    local = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    objects_there = fetch_without_rejected(s3, address)
    assert objects_there == local
    run_main(
        monkeypatch, "jsonl", *arguments[:2], "--images", tmp_path / "in" / "images", "--split", "b", "--out", tmp_path
    )
    assert {
        str(path.relative_to(tmp_path / "b")): path.read_bytes()
        for path in (tmp_path / "b").rglob("*")
        if path.is_file()
    } == local


def fetch_without_rejected(s3: S3Server, address: str) -> dict[str, bytes]:
    """As `fetch`, though a record was rejected."""
    prefix = address.removeprefix("s3://converted/")
    rejected = s3.client().get_object(Bucket="converted", Key=f"{prefix}/rejected.jsonl")["Body"].read()
    assert b"missing file" in rejected
    s3.client().put_object(Bucket="converted", Key=f"{prefix}/rejected.jsonl", Body=b"")
    return fetch(s3, address)


@pytest.mark.slow
def test_no_cluster(address: str) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with pytest.raises(ValueError, match=r"no Ray cluster at --address 127.0.0.1:1 "):
        convert_split(Found(SCENES), address, "train", address="127.0.0.1:1", **ON_RAY)
