"""Parts: the same bytes from any number of processes, whole or killed and begun again."""

import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import Slow, picture, read_rejected, read_samples
from streaming.base.util import merge_index

from convert import parts
from convert.items import Entry, Found, Item, Note, Rejected
from convert.jsonl import find
from convert.shapes import Scene
from convert.store import locked, staging_folder
from convert.write import convert_split
from recipe import records
from recipe.records import RECORDS_FILE, read_records
from recipe.schema import Sample

BAD = (2, 8, 9, 10, 11)  # the third part of four records has none that is good
NUM_RECORDS = 18


@dataclass(frozen=True)
class Broken(Slow):
    """An entry that cannot be read at all."""

    error: BaseException | None = None

    def read(self) -> Iterator[Item]:
        if self.error is None:
            os._exit(9)
        raise self.error


@pytest.fixture
def found(tmp_path: Path) -> Found:
    """Eighteen records, some bad, one with a box that is clipped."""
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for index in range(NUM_RECORDS):
        (images / f"{index}.jpg").write_bytes(picture((20 + index, 10)))
        box = [1, 1, 0 if index in BAD else 8, 10.5 if index == 5 else 8]
        objects = [{"bbox_2d": box, "desc": f"thing {index}"}]
        lines.append(json.dumps({"images": [f"{index}.jpg"], "objects": objects}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    return replace(find(tmp_path / "train.jsonl", images), leading=[Note("left out", 1), Rejected("x", "y", "z")])


def convert(found: Found, out: Path, **options: Any) -> Any:
    return convert_split(found, str(out), "train", **{"part_records": 4, "size_limit": 2500, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_at(name: str, write: Callable[[Path, bytes], None], path: Path, content: bytes) -> None:
    if path.name == name:
        raise OSError("full")
    write(path, content)


def with_entry(found: Found, position: int, change: Callable[[Entry], Entry]) -> Found:
    entries = list(found.entries)
    entries[position] = change(entries[position])
    return replace(found, entries=entries)


def stop_at(found: Found, position: int, out: Path, **options: Any) -> None:
    """A conversion that fails at a record: the parts before it stay."""
    with pytest.raises(ValueError, match="midway"):
        convert(with_entry(found, position, lambda entry: Broken(entry, 0, ValueError("midway"))), out, **options)
    assert not (out / "train").exists()


def test_by_hand(found: Found, tmp_path: Path) -> None:
    summary = convert(found, tmp_path / "out")
    good = [index for index in range(NUM_RECORDS) if index not in BAD]
    samples = read_samples(tmp_path / "out")
    assert [sample.id for sample in samples] == [f"train-{index + 1:06d}" for index in good]
    assert [row["id"] for row in read_rejected(tmp_path / "out")] == ["x", *(f"train-{i + 1:06d}" for i in BAD)]
    assert (summary.samples, summary.parts, summary.kept, len(summary.rejected)) == (13, 5, 0, 6)
    assert summary.notes == {"left out": 1, "boxes clipped to the image by rounding": 1}
    index = json.loads((tmp_path / "out" / "train" / "index.json").read_text())
    names = [shard["raw_data"]["basename"] for shard in index["shards"]]
    assert names == sorted(names)
    assert {name.split("/")[0] for name in names} == {"00000", "00001", "00003", "00004"}
    assert names[:2] == ["00000/shard.00000.mds", "00000/shard.00001.mds"]
    assert files(tmp_path / "out" / "train").keys() == {*names, "index.json", RECORDS_FILE}
    records = list(read_records(tmp_path / "out" / "train" / RECORDS_FILE, index))
    assert records == [replace(sample, image=b"") for sample in samples]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "rejected.jsonl"}


@pytest.mark.parametrize("num_workers", [1, 2, 3, 50])
def test_any_number_of_workers_gives_the_same_bytes(found: Found, tmp_path: Path, num_workers: int) -> None:
    expected = convert(found, tmp_path / "a", num_workers=0)
    slow_first = with_entry(found, 0, lambda entry: Slow(entry, 0.3))
    assert str(convert(slow_first, tmp_path / "b", num_workers=num_workers)) == str(expected)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 2)])
def test_killed_and_begun_again_ends_the_same(found: Found, tmp_path: Path, before: int, after: int) -> None:
    expected = convert(found, tmp_path / "whole")
    slow = replace(found, entries=[Slow(entry, 0.1) for entry in found.entries])
    out = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=convert, args=(slow, out), kwargs={"num_workers": before})
    process.start()
    staging = staging_folder(str(out / "train"))
    while len(list(staging.glob("*/part.json"))) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (out / "train").exists()
    summary = convert(found, out, num_workers=after)
    assert 2 <= summary.kept < 5
    assert str(summary) == str(expected)
    assert files(out) == files(tmp_path / "whole")


def test_fails_while_it_is_published(found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = convert(found, tmp_path / "whole")
    for name in ("parts.join_parts", "parts.write_whole", "store.save_rejected", "write.rename"):
        with monkeypatch.context() as patch:
            if name == "parts.write_whole":  # of the index, not of a part
                write_index = partial(fail_at, "index.json", records.write_whole)
                patch.setattr("convert.parts.write_whole", write_index)
            else:
                patch.setattr(f"convert.{name}", lambda *_: (_ for _ in ()).throw(OSError("full")))
            with pytest.raises(OSError, match="full"):
                convert(found, tmp_path / name)
        assert not (tmp_path / name / "train").exists()
        summary = convert(found, tmp_path / name)
        assert summary.kept == 5
        assert str(summary) == str(expected)
        assert files(tmp_path / name) == files(tmp_path / "whole")


def test_the_layout_is_that_of_merge_index(found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming's own function makes the same index of the parts; ours also works in a folder that it gets wrong."""
    merge_parts = parts.merge_parts

    def merge_twice(job: parts.Job) -> None:
        indexes = [str(folder / "index.json") for folder in job.folders]
        merge_index(indexes, str(tmp_path / "merged"))
        merge_parts(job)

    with monkeypatch.context() as patch:
        patch.setattr("convert.parts.merge_parts", merge_twice)
        convert(found, tmp_path / "out")
    expected = json.loads((tmp_path / "merged" / "index.json").read_text())
    assert json.loads((tmp_path / "out" / "train" / "index.json").read_text()) == expected
    convert(found, tmp_path / "no. #1?")
    assert files(tmp_path / "no. #1?") == files(tmp_path / "out")
    assert read_samples(tmp_path / "no. #1?") == read_samples(tmp_path / "out")


def test_what_a_killed_merge_left_is_not_published(found: Found, tmp_path: Path) -> None:
    stop_at(found, 17, tmp_path / "out")
    staging = staging_folder(str(tmp_path / "out" / "train"))
    (staging / "data" / "index.json.1.partial").touch()
    (staging / "data" / "00009").mkdir()
    convert(found, tmp_path / "out")
    convert(found, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out" / "train" / "00009").exists()


def test_overwrite_keeps_the_old_until_the_new_is_whole(found: Found, tmp_path: Path) -> None:
    convert(Found(found.entries[:3]), tmp_path)
    old = files(tmp_path / "train")
    with pytest.raises(ValueError, match="midway"):
        stopped = with_entry(found, 17, lambda entry: Broken(entry, 0, ValueError("midway")))
        convert(stopped, tmp_path, overwrite=True)
    assert files(tmp_path / "train") == old
    assert convert(found, tmp_path, overwrite=True).kept == 4
    assert len(read_samples(tmp_path)) == 13


def test_a_changed_picture_remakes_its_part_alone(found: Found, tmp_path: Path) -> None:
    stop_at(found, 17, tmp_path / "out")
    (tmp_path / "images" / "5.jpg").write_bytes(picture((25, 10), quality=10))
    assert convert(found, tmp_path / "out").kept == 3
    convert(found, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_touched_picture_remakes_its_part(found: Found, tmp_path: Path) -> None:
    stop_at(found, 17, tmp_path / "out")
    os.utime(tmp_path / "images" / "5.jpg", ns=(1, 1))
    assert convert(found, tmp_path / "out").kept == 3


def test_changed_annotations_remake_their_part_alone(found: Found, tmp_path: Path) -> None:
    stop_at(found, 17, tmp_path / "out")
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text().replace("thing 0", "a thing with a longer name"))
    again = replace(find(path, tmp_path / "images"), leading=found.leading)
    assert convert(again, tmp_path / "out").kept == 3
    convert(again, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("changed", [{"hashes": []}, {"size_limit": 1}, {"strict": True}])
def test_changed_options_remake_everything(found: Found, tmp_path: Path, changed: dict[str, Any]) -> None:
    good = Found([entry for index, entry in enumerate(found.entries) if index not in BAD])
    stop_at(good, 12, tmp_path / "out")
    assert convert(good, tmp_path / "out", **changed).kept == 0


def test_fewer_records_than_before_leave_no_stray_shard(found: Found, tmp_path: Path) -> None:
    stop_at(found, 17, tmp_path / "out", size_limit=1)
    convert(Found(found.entries[:3]), tmp_path / "out", size_limit="1mb")
    convert(Found(found.entries[:3]), tmp_path / "whole", size_limit="1mb")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    "lost", ["data/00001/shard.00000.mds", f"00001/{RECORDS_FILE}", "00001/part.json", "00001/index.json"]
)
def test_a_part_that_lost_a_file_is_made_again(found: Found, tmp_path: Path, lost: str) -> None:
    stop_at(found, 17, tmp_path / "out")
    (staging_folder(str(tmp_path / "out" / "train")) / lost).unlink()
    assert convert(found, tmp_path / "out").kept == 3


@pytest.mark.parametrize("num_workers", [1, 2])
def test_strict_stops_at_the_first_in_order(found: Found, tmp_path: Path, num_workers: int) -> None:
    """The bad records of the third part are found long before that of the first."""
    slow_first = replace(with_entry(found, 0, lambda entry: Slow(entry, 0.3)), leading=())
    for _ in range(2):  # the second time from kept parts
        with pytest.raises(ValueError, match=r"train.jsonl: line 3 .*zero-area box|train.jsonl: line 3 .*inverted box"):
            convert(slow_first, tmp_path, strict=True, num_workers=num_workers)
        assert [row["id"] for row in read_rejected(tmp_path)] == ["train-000003"]
        assert not (tmp_path / "train").exists()
    with pytest.raises(ValueError, match=r"^y \(id 'x'\): z"):
        convert(found, tmp_path, strict=True)


def test_a_part_that_cannot_be_read_fails_the_conversion(found: Found, tmp_path: Path) -> None:
    scenes = Found([*found.entries, Scene(0, 0, min_objects=60, max_objects=60)])
    with pytest.raises(ValueError, match="no room for 60 shapes"):
        convert(scenes, tmp_path, num_workers=2)
    assert not (tmp_path / "train").exists()


def test_a_worker_that_dies_fails_the_conversion(found: Found, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"worker process was killed.*--num-workers"):
        convert(with_entry(found, 17, lambda entry: Broken(entry, 0)), tmp_path, num_workers=2)
    assert not (tmp_path / "train").exists()
    assert convert(found, tmp_path).samples == 13


def test_two_conversions_do_not_mix(found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.store._LOCK_SECONDS", 0.1)
    staging = staging_folder(str(tmp_path / "train"))
    staging.mkdir()
    with (staging / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another conversion is writing"):
            convert(found, tmp_path)
        assert staging.exists()
    convert(found, tmp_path)
    assert not staging.exists()


def test_a_worker_that_outlives_its_parent_holds_the_lock(tmp_path: Path) -> None:
    """Else it could remove what the next conversion has written."""
    staging, ended = tmp_path / ".train.parts", tmp_path / "ended"
    process = os.fork()
    if process == 0:
        with locked(staging, "train", keep=True):
            if os.fork() != 0:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.5)
            ended.touch()
            os._exit(0)
    os.waitpid(process, 0)
    with locked(staging, "train", keep=True):
        assert ended.exists()


def test_first_failure_without_a_finished_part_leaves_nothing(found: Found, tmp_path: Path) -> None:
    stop_at(found, 0, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_first_record_with_an_id_owns_it(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture())
    records = [{"id": "a", "images": [name]} for name in ("none.jpg", "a.jpg")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [*records, {"id": "b", "images": ["a.jpg"]}])))
    convert(find(tmp_path / "train.jsonl", tmp_path), tmp_path, part_records=1, num_workers=2)
    assert [(row["source"], row["reason"]) for row in read_rejected(tmp_path)] == [
        ("train.jsonl: line 1", "missing file"),
        ("train.jsonl: line 2", "duplicate id"),
    ]
    assert read_samples(tmp_path) == [Sample("b", picture(), 20, 10, None)]
