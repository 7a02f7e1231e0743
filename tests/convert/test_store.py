"""Conversions to an object store; a folder stands in for it."""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest
from convert_helpers import read_rejected, read_samples
from streaming.base.storage import LocalUploader, upload

from convert import lease
from convert.divide import Division
from convert.items import Found, Item, Rejected
from convert.shapes import Scene, draw_scene
from convert.store import save_rejected
from convert.verify import verify
from convert.write import convert_split, convert_splits, write_split
from recipe.records import RECORDS_FILE

ADDRESS = "s3://bucket/set"
SCENES = Found([Scene(1, index, 56) for index in range(6)])
SAMPLES = [draw_scene(1, index, 56) for index in range(6)]
BAD = Rejected("x", "file: line 9", "some reason", "value")


class FakeStore(LocalUploader):
    """`s3://bucket/...` as the folder `root`; refuses the files in `broken`."""

    root: Path
    broken: frozenset[str] = frozenset()
    uploaded: list[str]
    can_list = True

    def __init__(self, out: tuple[str, str], *args: object, **more: object) -> None:
        super().__init__((out[0], str(self.root / urlparse(out[1]).path.lstrip("/"))))

    def upload_file(self, filename: str) -> None:
        key = str(Path(str(self.remote), filename).relative_to(self.root))
        name = key.split("/", maxsplit=2)[-1]  # below the split
        if name in self.broken:
            raise ConnectionError("503 slow down")
        if not name.endswith(lease.SUFFIX):
            self.uploaded.append(name)
        super().upload_file(filename)

    def list_objects(self, prefix: str | None = None) -> list[str]:
        if not self.can_list:
            raise NotImplementedError
        start = f"{self.remote}/{prefix or ''}"
        paths = [path for path in self.root.rglob("*") if str(path).startswith(start) and path.is_file()]
        return [str(path.relative_to(self.root)) for path in paths]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "bucket"
    monkeypatch.setattr(FakeStore, "root", root, raising=False)
    monkeypatch.setattr(FakeStore, "uploaded", [], raising=False)
    monkeypatch.setattr(upload, "S3Uploader", FakeStore)
    monkeypatch.setattr(
        "streaming.base.storage.CloudDownloader.direct_download",
        lambda remote, local: shutil.copy(root / urlparse(remote).path.lstrip("/"), local),
    )
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return root


def failing() -> Iterator[Item]:
    yield SAMPLES[0]
    raise RuntimeError("midway")


def convert(split: str = "train", num_workers: int = 1, **options: object) -> int:
    """Two scenes a part; returns the number of parts that were kept."""
    return convert_split(SCENES, ADDRESS, split, part_records=2, num_workers=num_workers, **options).kept  # pyright: ignore


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def staged(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "temporary").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_store_gets_what_a_folder_gets(bucket: Path, tmp_path: Path, num_workers: int) -> None:
    convert(num_workers=num_workers)
    assert read_samples(bucket / "set") == SAMPLES
    assert list(verify(bucket / "set" / "train", decode=True)) == []
    convert_split(SCENES, str(tmp_path / "local"), "train", part_records=2)
    assert files(bucket / "set" / "train") == files(tmp_path / "local" / "train")
    assert staged(tmp_path) == []


def test_two_parts(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder, also if the second index fails after the first is there."""
    found, division = Found([Scene(1, number, 56) for number in range(12)]), Division(0.3)
    upload_file = FakeStore.upload_file

    def upload_or_fail(self: FakeStore, filename: str) -> None:
        if filename == "index.json" and str(self.remote).endswith("train"):
            raise ConnectionError("503")
        upload_file(self, filename)

    with monkeypatch.context() as patch:
        patch.setattr(FakeStore, "upload_file", upload_or_fail)
        with pytest.raises(OSError, match=r"cannot upload s3://bucket/set/train/index.json"):
            convert_splits(found, ADDRESS, "train", division, part_records=2)
    assert (bucket / "set/val/index.json").is_file()
    assert not (bucket / "set/train/index.json").exists()
    FakeStore.uploaded.clear()
    convert_splits(found, ADDRESS, "train", division, part_records=2)
    assert FakeStore.uploaded == ["rejected.jsonl"] * 2 + [RECORDS_FILE, "index.json"]
    convert_splits(found, str(tmp_path / "local"), "train", division, part_records=2)
    for split in ("val", "train"):
        assert files(bucket / "set" / split) == files(tmp_path / "local" / split)
    assert staged(tmp_path) == []
    with pytest.raises(ValueError, match=r"s3://bucket/set/train holds a data set"):
        convert_splits(found, ADDRESS, "train", division)


def test_the_index_goes_last(bucket: Path) -> None:
    convert()
    assert FakeStore.uploaded[-2:] == [RECORDS_FILE, "index.json"]
    assert sum("/shard." in name for name in FakeStore.uploaded) == 3


def test_items_and_rejected_records(bucket: Path) -> None:
    write_split([*SAMPLES, BAD], ADDRESS, "train", size_limit=1)
    write_split([BAD, *SAMPLES], ADDRESS, "eval")
    assert read_samples(bucket / "set") == SAMPLES
    assert [row["split"] for row in read_rejected(bucket / "set")] == ["train", "eval"]
    with pytest.raises(RuntimeError, match="midway"):
        write_split(failing(), ADDRESS, "other")
    assert not (bucket / "set" / "other" / "index.json").exists()


def test_a_data_set_is_not_overwritten(bucket: Path) -> None:
    convert()
    before = files(bucket / "set" / "train")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"s3://bucket/set/train holds a data set"):
            convert(overwrite=overwrite)
    assert files(bucket / "set" / "train") == before


@pytest.mark.parametrize("broken", ["00002/shard.00000.mds", RECORDS_FILE, "index.json"])
def test_a_failed_upload_fails_and_can_go_on(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(FakeStore, "broken", frozenset({broken}))
    with pytest.raises(OSError, match=rf"cannot upload s3://bucket/set/train/{broken}: ConnectionError: 503"):
        convert()
    assert not (bucket / "set" / "train" / "index.json").exists()
    assert not any(name.endswith(".mds") for name in staged(tmp_path))
    monkeypatch.setattr(FakeStore, "broken", frozenset())
    FakeStore.uploaded.clear()
    assert convert() == (2 if "shard" in broken else 3)
    assert ("00000/shard.00000.mds" in FakeStore.uploaded) is False
    assert read_samples(bucket / "set") == SAMPLES
    assert list(verify(bucket / "set" / "train")) == []
    assert staged(tmp_path) == []


def test_a_shard_that_left_the_store_is_made_again(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStore, "broken", frozenset({"index.json"}))
    with pytest.raises(OSError, match="cannot upload"):
        convert()
    (bucket / "set" / "train" / "00001" / "shard.00000.mds").unlink()
    monkeypatch.setattr(FakeStore, "broken", frozenset())
    assert convert() == 2
    assert list(verify(bucket / "set" / "train")) == []


def test_a_store_that_cannot_be_listed(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStore, "can_list", False)
    monkeypatch.setattr(FakeStore, "broken", frozenset({"index.json"}))
    with pytest.raises(OSError, match="cannot upload"):
        convert()
    monkeypatch.setattr(FakeStore, "broken", frozenset())
    assert convert() == 3
    assert read_samples(bucket / "set") == SAMPLES
    with pytest.raises(ValueError, match=r"s3://bucket/set/train holds a data set"):
        convert()
    write_split([*SAMPLES, BAD], ADDRESS, "one")
    write_split([*SAMPLES, BAD], ADDRESS, "two")
    assert [row["split"] for row in read_rejected(bucket / "set")] == ["one", "two"]


@pytest.mark.parametrize("last", [RECORDS_FILE, "index.json"])
def test_killed_while_it_publishes(bucket: Path, tmp_path: Path, last: str) -> None:
    def die_at_last() -> None:
        def upload_file(self: FakeStore, filename: str) -> None:
            if filename == last:
                os.kill(os.getpid(), signal.SIGKILL)
            LocalUploader.upload_file(self, filename)

        FakeStore.upload_file = upload_file
        convert()

    process = multiprocessing.get_context("fork").Process(target=die_at_last)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert convert() == 3
    assert list(verify(bucket / "set" / "train")) == []
    assert staged(tmp_path) == []


def test_no_secret_is_told(bucket: Path) -> None:
    address = "nowhere://user:the-password@host/set"
    with pytest.raises(OSError, match="cannot reach nowhere://<redacted>@host/set/train") as raised:
        convert_split(SCENES, address, "train")
    assert "the-password" not in str(raised.value)


def test_splits_converted_at_the_same_time_keep_all_rejected_records(tmp_path: Path) -> None:
    names = [f"split-{number}" for number in range(8)]
    threads = [threading.Thread(target=save_rejected, args=(str(tmp_path / "out"), name, [BAD])) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["split"] for row in read_rejected(tmp_path / "out")) == names
    (tmp_path / "out" / "rejected.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"out/rejected\.jsonl is not a list of rejected records .*move it away"):
        save_rejected(str(tmp_path / "out"), "more", [BAD])


def test_staging(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStore, "broken", frozenset({"index.json"}))
    with pytest.raises(OSError, match="cannot upload"):
        convert(staging=str(tmp_path / "chosen"))
    assert staged(tmp_path) == []
    assert len(list((tmp_path / "chosen").rglob("0000?/part.json"))) == 3
    monkeypatch.setattr(FakeStore, "broken", frozenset())
    assert convert(staging=str(tmp_path / "chosen")) == 3
    with pytest.raises(ValueError, match="--staging is for object stores"):
        convert_split(SCENES, str(tmp_path / "local"), "train", staging=str(tmp_path))


def test_a_store_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match=r"cannot reach nowhere://set/train: ValueError: Invalid Cloud provider"):
        convert_split(SCENES, "nowhere://set", "train")
