"""Files that are already there, indexes, cache limits, clients and epochs: what Streaming's own classes get wrong."""

import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from streaming import Stream, StreamingDataset
from streaming.base.storage.download import LocalDownloader

from recipe.records import parse_index
from recipe.upstream.storage import CheckedDataset, open_streams
from tests.data.storage_cases import (
    BATCH_SIZE,
    NUM_ROWS,
    NUM_SHARDS,
    flip_last_byte,
    open_rows,
    read_numbers,
    write_rows,
)
from tests.support.s3_server import SECRET_KEY

ALL = list(range(NUM_ROWS))


pytestmark = pytest.mark.usefixtures("impatience")


@pytest.fixture(params=[None, "zstd"], ids=["raw", "zstd"])
def rows(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_rows(tmp_path / "rows", compression=request.param)


def a_shard(folder: Path) -> Path:
    return next(folder.glob("shard.00003.mds*"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_row_is_read_once(tmp_path: Path, rows: Path, num_workers: int):
    assert read_numbers(open_rows({"local": str(rows)}), num_workers) == ALL
    dataset = open_rows({"remote": str(rows), "local": str(tmp_path / "cache")})
    assert read_numbers(dataset, num_workers) == ALL
    assert read_numbers(dataset, num_workers) == ALL


def test_rows_at_random_and_of_several_streams(tmp_path: Path, rows: Path):
    other = write_rows(tmp_path / "other")
    keywords = {"a": {"local": str(rows)}, "b": {"remote": str(other), "local": str(tmp_path / "cache")}}
    dataset = CheckedDataset(streams=open_streams(keywords), batch_size=BATCH_SIZE)
    assert [dataset[position]["number"] for position in (39, 0, 40, 79)] == [39, 0, 0, 39]
    assert read_numbers(dataset, 2) == sorted(ALL * 2)


def test_a_broken_off_epoch_is_followed_by_a_whole_one(rows: Path):
    dataset = open_rows({"local": str(rows)})
    first = iter(dataset)
    next(first)
    second = iter(dataset)
    next(second)
    with pytest.raises(RuntimeError, match=r"1 of 40 samples.*another iteration"):
        next(first)
    del first
    assert len(list(second)) == NUM_ROWS - 1
    assert read_numbers(dataset) == ALL


def test_a_finished_epoch_is_not_replayed(rows: Path):
    dataset = open_rows({"local": str(rows)})
    assert len(list(dataset)) == NUM_ROWS
    assert dataset.state_dict(0, True)["epoch"] == 1
    assert StreamingDataset.state_dict(dataset, 0, True)["epoch"] == 0, "upstream is mended: so can this be removed"
    next(iter(dataset))
    assert dataset.state_dict(1, True) == {**dataset.state_dict(0, True), "epoch": 1, "sample_in_epoch": 1}


def break_shard(how: str, folder: Path) -> Path:
    path = a_shard(folder)
    if how == "flip":
        flip_last_byte(path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.unlink()
    return path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_byte_in_a_local_folder_ends_the_iteration(rows: Path, num_workers: int):
    path = break_shard("flip", rows)
    dataset = open_rows({"local": str(rows)})
    with pytest.raises(
        RuntimeError, match=rf"of \d+ samples.*{path.name}.* has the xxh64 \w+, its index says \w+, and"
    ):
        read_numbers(dataset, num_workers)
    with pytest.raises(RuntimeError, match=rf"shard\.00003\.mds.*{path.name} has the xxh64"):
        read_numbers(dataset, num_workers)
    assert path.exists(), "the only copy"


def test_a_flipped_byte_in_a_local_folder_is_never_read_at_random(rows: Path):
    path = break_shard("flip", rows)
    dataset = open_rows({"local": str(rows)})
    assert dataset[0]["number"] == 0
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{path.name} has the xxh64"):
            dataset[13]


@pytest.mark.parametrize(("how", "message"), [("cut", r"has \d+ bytes, its index says \d+"), ("lose", "is missing")])
def test_a_cut_or_lost_file_in_a_local_folder_is_named_at_the_start(rows: Path, how: str, message: str):
    path = break_shard(how, rows)
    with pytest.raises(ValueError, match=rf"shard\.00003\.mds.*{message}.* no `remote`"):
        open_streams({"rows": {"local": str(rows)}})
    assert path.exists() == (how == "cut")


@pytest.mark.parametrize("how", ["flip", "cut", "lose"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_file_of_a_cache_is_fetched_anew(tmp_path: Path, rows: Path, how: str, num_workers: int):
    cache = tmp_path / "cache"
    stream = {"remote": str(rows), "local": str(cache), "keep_zip": True}
    assert read_numbers(open_rows(stream)) == ALL
    for path in cache.glob("shard.00003.*"):
        if how == "lose":
            path.unlink()
        elif how == "cut":
            path.write_bytes(path.read_bytes()[:-7])
        else:
            flip_last_byte(path)
    again = tmp_path / "again"
    shutil.copytree(cache, again)
    assert read_numbers(open_rows({**stream, "local": str(again)}), num_workers) == ALL
    assert (again / "shard.00003.mds").stat().st_size == (cache / "shard.00004.mds").stat().st_size


def test_upstream_reads_the_flipped_byte(rows: Path, tmp_path: Path):
    """Why all this is here: remove what upstream has mended."""
    if a_shard(rows).suffix != ".mds":
        pytest.skip("the compressed form is checked by its decompressor")
    flip_last_byte(a_shard(rows))
    dataset = StreamingDataset(streams=[Stream(local=str(rows), validate_hash="xxh64")], batch_size=4)
    assert max(row["number"] for row in dataset) > NUM_ROWS


def test_without_checksums_sizes_are_checked_and_it_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = write_rows(tmp_path / "rows", hashes=None)
    with caplog.at_level(logging.WARNING):
        assert read_numbers(open_rows({"local": str(rows)})) == ALL
    assert [record.message for record in caplog.records if "no checksums" in record.message] == [
        f"{rows / 'index.json'} holds no checksums: only the sizes of its files are checked. Convert the data set "
        "again, or with MDSWriter(hashes=['xxh64'])"
    ]
    break_shard("cut", rows)
    with pytest.raises(ValueError, match="its index says"):
        open_rows({"local": str(rows)})


def test_a_chosen_checksum_is_used_or_refused(tmp_path: Path):
    rows = write_rows(tmp_path / "rows", hashes=["sha1", "xxh64"])
    flip_last_byte(a_shard(rows))
    with pytest.raises(RuntimeError, match="has the xxh64 "):
        read_numbers(open_rows({"local": str(rows), "validate_hash": "xxh64"}))
    with pytest.raises(ValueError, match=r"validate_hash is 'md5', .* holds \['sha1', 'xxh64'\]"):
        open_streams({"rows": {"local": str(rows), "validate_hash": "md5"}})
    with pytest.raises(ValueError, match="validate_hash is 'md5'"):
        open_rows({"local": str(rows)}, validate_hash="md5")


def test_parts_of_killed_runs_are_removed(tmp_path: Path, rows: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    old, new = cache / ".shard.00003.mds.ab.part.cd", cache / ".shard.00003.mds.ef.part"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    read_numbers(open_rows({"remote": str(rows), "local": str(cache)}))
    assert not old.exists()
    assert new.exists(), "it may be a living run's"
    assert not [path for path in cache.iterdir() if "part" in path.name and path != new]


@pytest.mark.parametrize("remote", [None, "same", "same/"])
def test_a_cache_limit_never_deletes_the_only_copy(rows: Path, remote: str | None):
    keywords = {"local": str(rows)} if remote is None else {"local": str(rows), "remote": f"{rows}{remote[4:]}"}
    before = {path.name: path.read_bytes() for path in rows.iterdir()}
    with pytest.raises(ValueError, match=r"cache_limit is 100kb.*no `remote`.*Remove cache_limit"):
        open_rows(keywords, cache_limit="100kb")
    assert {path.name: path.read_bytes() for path in rows.iterdir()} == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_limit_holds_and_what_is_there_is_checked(tmp_path: Path, rows: Path, num_workers: int):
    cache = tmp_path / "cache"
    stream = {"remote": str(rows), "local": str(cache)}
    read_numbers(open_rows(stream))
    flip_last_byte(cache / "shard.00003.mds")
    again = tmp_path / "again"
    shutil.copytree(cache, again)
    limit = 6 * 2400 + (rows / "index.json").stat().st_size
    dataset = open_rows({**stream, "local": str(again)}, cache_limit=limit, predownload=4)
    assert not (again / "shard.00003.mds").exists()
    assert dataset.cache_usage == sum(path.stat().st_size for path in again.iterdir())
    assert read_numbers(dataset, num_workers) == ALL
    # Streaming counts a shard when it is there, so some may be under way at once.
    assert len(list(again.glob("shard.*.mds"))) < NUM_SHARDS
    assert [dataset[position]["number"] for position in ALL] == ALL


def test_a_cache_smaller_than_what_is_asked_for_ahead_is_slow_but_ends(tmp_path: Path, rows: Path):
    limit = 3 * 2400 + (rows / "index.json").stat().st_size
    stream = {"remote": str(rows), "local": str(tmp_path / "cache")}
    dataset = open_rows(stream, cache_limit=limit, predownload=NUM_ROWS, shuffle=True, shuffle_block_size=NUM_ROWS)
    found: list[int] = []
    # Without the rescue the threads sleep for ever.
    thread = threading.Thread(target=lambda: found.extend(read_numbers(dataset)), daemon=True)
    thread.start()
    thread.join(60)
    assert found == ALL


def test_a_failure_leaves_no_lock_behind(rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(self: Any) -> None:
        raise ValueError("no shard to evict")

    dataset = open_rows({"remote": str(rows), "local": str(tmp_path / "cache")}, cache_limit="1mb")
    dataset.cache_usage = 1 << 20
    monkeypatch.setattr(StreamingDataset, "_evict_coldest_shard", fail)
    with pytest.raises(RuntimeError, match="no shard to evict") as failure:
        dataset[0]
    held: list[bool] = []

    def try_lock() -> None:
        with FileLock(dataset._cache_filelock_path, timeout=2):
            held.append(False)

    thread = threading.Thread(target=try_lock)
    thread.start()
    thread.join()
    assert held == [False], f"still locked after {failure}"


@pytest.mark.parametrize("name", ["../escaped.mds", "/escaped.mds", "a/../../escaped.mds", "..", ""])
@pytest.mark.parametrize("key", ["raw_data", "zip_data"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, rows: Path, name: str, key: str):
    index = json.loads((rows / "index.json").read_text())
    index["shards"][0][key] = {"basename": name, "bytes": 1, "hashes": {}}
    (rows / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        open_streams({"rows": {"local": str(rows)}})
    cache = tmp_path / "deep" / "cache"
    with pytest.raises(RuntimeError, match="names a file outside its folder"):
        open_streams({"rows": {"remote": str(rows), "local": str(cache)}})
    assert list(cache.iterdir()) == []
    assert not (tmp_path / "escaped.mds").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": 2, "shards": [{"raw_data"', '{"version": 2, "shards": 3}']
)
def test_a_broken_index_is_said_to_be_broken(tmp_path: Path, content: str):
    path = tmp_path / "index.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is truncated or not an index of shards"):
        parse_index(path)
    with pytest.raises(ValueError, match=r"index\.json is truncated.*convert the data set again"):
        open_streams({"rows": {"local": str(tmp_path)}})


def test_a_broken_index_of_a_cache_is_fetched_anew(tmp_path: Path, rows: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "index.json").write_text((rows / "index.json").read_text()[:100])
    assert read_numbers(open_rows({"remote": str(rows), "local": str(cache)})) == ALL


def test_an_unknown_store_is_refused_with_those_known(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"s4://bucket: no store is called s4://; .* azure://.* gs://.* oci://.* s3://"
    ):
        open_streams({"rows": {"remote": "s4://bucket", "local": str(tmp_path)}})
    with pytest.raises(ValueError, match="no `local`"):
        open_streams({"rows": {"remote": "s3://bucket"}})


def test_no_secret_of_a_client_s_error_is_told(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(self: Any, remote: str, local: str, timeout: float) -> None:
        raise OSError(f"refused {os.environ['AWS_SECRET_ACCESS_KEY']}")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setattr(LocalDownloader, "_download_file_impl", refuse)
    with pytest.raises(RuntimeError, match=r"4 attempts: OSError: refused <redacted>") as error:
        open_streams({"rows": {"remote": str(rows), "local": str(tmp_path / "cache")}})
    assert SECRET_KEY not in f"{error.getrepr(chain=True)}{caplog.text}"
