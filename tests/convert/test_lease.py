"""Two conversions into one address of a store, from any machines: one at a time."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from convert import lease
from convert.lease import hold

ADDRESS = "s3://bucket/set/train"


@pytest.fixture(autouse=True)
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The store as a folder; everything takes a fiftieth of the time."""
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "WATCH", 0.5)
    monkeypatch.setattr(lease, "SETTLE", 0.05)
    monkeypatch.setattr("convert.store.exists", lambda address, name: path(tmp_path, address, name).is_file())
    monkeypatch.setattr("convert.store.read", lambda address, name: path(tmp_path, address, name).read_bytes())
    monkeypatch.setattr(
        "convert.store.upload",
        lambda folder, names, address: [(folder / name).replace(path(tmp_path, address, name)) for name in names],
    )
    yield tmp_path


def path(root: Path, address: str, name: str) -> Path:
    return root / f"{address}/{name}".replace("/", "-")


def kept(root: Path) -> Path:
    return path(root, "s3://bucket/set", ".train.converting.json")


def write_as(root: Path, **content: object) -> None:
    kept(root).write_text(json.dumps({"token": "other", "host": "elsewhere", "pid": 7, **content}))


def test_held_until_the_end(objects: Path) -> None:
    with hold(ADDRESS) as one:
        first = json.loads(kept(objects).read_bytes())
        time.sleep(0.4)
        now = json.loads(kept(objects).read_bytes())
        assert now["number"] > first["number"] and now["token"] == first["token"]
        one.check()
        with (
            pytest.raises(ValueError, match=rf"is writing {ADDRESS} \(process {os.getpid()} on .*\): wait for it"),
            hold(ADDRESS),
        ):
            pass
    assert "token" not in json.loads(kept(objects).read_bytes())
    with hold(ADDRESS):
        pass


def test_of_a_killed_one_it_is_taken(objects: Path) -> None:
    write_as(objects)
    began = time.monotonic()
    with hold(ADDRESS):
        assert time.monotonic() - began > 0.4, "another machine's is watched first"


def test_one_on_another_machine_is_alive(objects: Path) -> None:
    write_as(objects, number=1)
    timer = threading.Timer(0.2, lambda: write_as(objects, number=2))
    timer.start()
    with pytest.raises(ValueError, match=r"\(process 7 on elsewhere\)"), hold(ADDRESS):
        pass
    timer.join()


def test_of_two_that_begin_at_once_the_last_one_goes_on(objects: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE", 0.3)
    timer = threading.Timer(0.1, lambda: write_as(objects, number=0))
    timer.start()
    with pytest.raises(ValueError, match=r"\(process 7 on elsewhere\)"), hold(ADDRESS):
        pass
    timer.join()


def test_one_that_slept_stops(objects: Path) -> None:
    with hold(ADDRESS) as one:
        write_as(objects)
        until = time.monotonic() + 10
        with pytest.raises(ValueError, match=r"elsewhere.*This one has stopped"):
            while time.monotonic() < until:
                one.check()
                time.sleep(0.05)
    assert json.loads(kept(objects).read_bytes())["token"] == "other", "the other's is left alone"


def test_of_a_folder_nothing_is_written(objects: Path) -> None:
    with hold(str(objects / "folder")) as one:
        one.check()
    assert list(objects.iterdir()) == []
