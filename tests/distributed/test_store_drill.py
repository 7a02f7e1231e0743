"""From an object store alone: convert into a bucket, train from it, be killed, resume from a checkpoint in it."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.distributed.packed_run import Settings
from tests.distributed.test_exact_resume import SCRIPT, read_steps
from tests.launches.launch import Launch, run_composer
from tests.support.s3_server import FaultProxy, S3Server

STEPS = 8
BUCKET = "drill"
SPLITS = {"train": 45, "val": 2, "teachers": 3}
SECONDS_OF_A_FILE = 11  # two attempts of 5 s, and 1 s between: what packed_run.py asks for
SECONDS_TO_STOP = 30  # what the launcher gives the other ranks


@dataclass(frozen=True)
class Drill:
    """What every launch shares."""

    checkpoint: str
    server: S3Server
    folder: Path

    def launch(self, name: str, world_size: int, env: dict[str, str], **changes: object) -> Launch:
        """A run in `folder / name` with an empty cache of its own; its ids are left there."""
        out = self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        defaults = {"data": f"s3://{BUCKET}/scenes", "cache": str(out / "cache"), "steps": STEPS}
        defaults |= {"save_folder": str(out / "checkpoints")}
        settings = Settings(self.checkpoint, out=str(out), **{**defaults, **changes})  # pyright: ignore
        (out / "settings.json").write_text(json.dumps(asdict(settings)))
        return run_composer(world_size, SCRIPT, str(out / "settings.json"), env=env, timeout=240, check=False)

    def steps(self, name: str, world_size: int, first: int = 0, until: int = STEPS) -> list[list[str]]:
        return [ids for ids, _ in read_steps(self.folder / name, world_size, first, until)]


def convert(out: str, split: str, num_samples: int, env: dict[str, str]) -> None:
    arguments = ["--out", out, "--split", split, "--size-limit", "30kb", "--num-samples", str(num_samples)]
    arguments += ["--seed", str(len(split)), "--image-size", "84", "--max-objects", "5", "--num-workers", "1"]
    run_composer(0, "convert/shapes.py", *arguments, env=env)


@pytest.fixture(scope="module")
def drill(tiny_checkpoint: str, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    """The scenes, converted straight into the bucket, and once more into a local folder."""
    folder = tmp_path_factory.mktemp("drill")
    s3.client().create_bucket(Bucket=BUCKET)
    for split, num_samples in SPLITS.items():
        convert(f"s3://{BUCKET}/scenes", split, num_samples, s3.env)
        convert(str(folder / "scenes"), split, num_samples, {})
    return Drill(tiny_checkpoint, s3, folder)


@pytest.fixture(scope="module")
def whole(drill: Drill) -> list[list[str]]:
    """The ids of every step of a run that was never stopped, on local data."""
    launch = drill.launch("whole", 1, {}, data=str(drill.folder / "scenes"), cache="")
    assert launch.returncode == 0, launch.output
    return drill.steps("whole", 1)


@pytest.fixture
def proxy(drill: Drill) -> Iterator[FaultProxy]:
    with FaultProxy(drill.server.endpoint) as proxy:
        yield proxy


def shards_in_bucket(drill: Drill) -> list[str]:
    listed = drill.server.client().list_objects_v2(Bucket=BUCKET, Prefix="scenes/train/")["Contents"]
    return sorted(item["Key"] for item in listed if item["Key"].endswith(".mds"))


@pytest.mark.drill
@pytest.mark.world_size(2)
def test_trained_killed_and_resumed_from_the_bucket(drill: Drill, whole: list[list[str]]):
    assert len(shards_in_bucket(drill)) >= 3
    env, checkpoints = drill.server.env, f"s3://{BUCKET}/run/checkpoints"
    killed = drill.launch("killed", 2, env, save_folder=checkpoints, kill_at=4, num_workers=2)
    assert killed.returncode != 0
    assert drill.steps("killed", 2, until=4) == whole[:4]
    # Checkpoints are sent in the background, so the last may be lost with the process.
    listed = drill.server.client().list_objects_v2(Bucket=BUCKET, Prefix="run/checkpoints/")["Contents"]
    saved = max(int(match[1]) for item in listed if (match := re.search(r"ba(\d+)\.pt\.manifest", item["Key"])))
    resumed = drill.launch("resumed", 1, env, save_folder=checkpoints)
    assert resumed.returncode == 0, resumed.output
    assert drill.steps("resumed", 1, first=saved) == whole[saved:]


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_a_store_that_stumbles_changes_nothing(drill: Drill, whole: list[list[str]], proxy: FaultProxy):
    first, second = (Path(key).name for key in shards_in_bucket(drill)[:2])
    proxy.inject("status", "index.json", times=1, status=503)
    proxy.inject("cut", first, times=1)
    proxy.inject("flip", second, times=1)
    launch = drill.launch("stumbling", 2, proxy.env)
    assert launch.returncode == 0, launch.output
    assert all(fault.times == 0 for fault in proxy.faults)
    assert drill.steps("stumbling", 2) == whole


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize(("fault", "num_workers"), [("status", 0), ("flip", 2), ("drip", 0)])
def test_a_shard_that_cannot_be_had_stops_every_rank(drill: Drill, proxy: FaultProxy, fault: str, num_workers: int):
    shard = Path(shards_in_bucket(drill)[1]).name
    proxy.inject(fault, shard, status=404)
    launch = drill.launch(f"{fault}-{num_workers}", 2, proxy.env, num_workers=num_workers)
    assert launch.returncode != 0
    assert time.monotonic() - proxy.first_request(shard) < SECONDS_OF_A_FILE + SECONDS_TO_STOP
    # All ranks raise it; the launcher may end some before they have printed it.
    assert re.search(rf"\[rank[01]\].*Error: .*{re.escape(shard)}.* in 2 attempts", launch.output), launch.output
