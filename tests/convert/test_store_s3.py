"""Conversions straight into a bucket of a real S3 server."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from convert_helpers import Slow

from convert import lease
from convert.items import Found
from convert.shapes import Scene
from convert.store import staging_folder
from convert.write import convert_split
from tests.support.s3_server import FaultProxy, S3Server

pytestmark = pytest.mark.slow


SCENES = [Scene(1, index, 56) for index in range(12)]


@pytest.fixture
def address(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty place in the bucket `converted`; the environment points to the server."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "empty").mkdir()
    s3.upload(tmp_path / "empty", "converted")
    return f"s3://converted/{request.node.name}"


def convert(found: Found, address: str, num_workers: int = 2) -> int:
    """Two scenes a part; returns the number of parts that were kept."""
    return convert_split(found, address, "train", part_records=2, num_workers=num_workers).kept


def fetch(s3: S3Server, address: str) -> dict[str, bytes]:
    """All objects under the address, by name; none is outside `train/` but the rejected records."""
    client, prefix = s3.client(), address.removeprefix("s3://converted/")
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="converted", Prefix=f"{prefix}/").get("Contents", [])]
    objects = {key: client.get_object(Bucket="converted", Key=key)["Body"].read() for key in keys}
    assert objects.pop(f"{prefix}/rejected.jsonl", b"") == b""
    objects.pop(f"{prefix}/.train{lease.SUFFIX}", None)
    return {key.removeprefix(f"{prefix}/train/"): data for key, data in objects.items()}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    convert(Found(SCENES), str(tmp_path / "local"), num_workers=1)
    folder = tmp_path / "local" / "train"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bucket_gets_what_a_folder_gets(s3: S3Server, address: str, expected: dict[str, bytes]) -> None:
    convert(Found(SCENES), address)
    assert fetch(s3, address) == expected
    with pytest.raises(ValueError, match="holds a data set"):
        convert(Found(SCENES), address)


def test_killed_and_begun_again_ends_the_same(s3: S3Server, address: str, expected: dict[str, bytes]) -> None:
    slow = Found([Slow(scene, 0.1) for scene in SCENES])
    process = multiprocessing.get_context("fork").Process(target=convert, args=(slow, address))
    process.start()
    staging = staging_folder(f"{address}/train")
    while len(list(staging.glob("0000?/part.json"))) < 2:
        assert process.is_alive()
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert "index.json" not in fetch(s3, address)
    assert 2 <= convert(slow, address) < 6
    assert fetch(s3, address) == expected
    assert not staging.exists()


def test_a_store_with_a_cold(
    s3: S3Server, address: str, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some 503s are tried again; a server that is down fails the conversion, which goes on when it is back."""
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        monkeypatch.setattr("convert.store.ATTEMPTS", 1)
        proxy.inject("status", "00005/shard", times=None)
        with pytest.raises(OSError, match=r"cannot upload s3://.*00005/shard\.00000\.mds: .*503"):
            convert(Found(SCENES), address, num_workers=1)
        proxy.refuse()
        with pytest.raises(OSError, match="cannot reach s3://"):
            convert(Found(SCENES), address, num_workers=1)
        proxy.accept()
        proxy.faults.clear()
        proxy.inject("status", "00005/shard", times=1)
        assert convert(Found(SCENES), address, num_workers=1) == 5
    assert fetch(s3, address) == expected
