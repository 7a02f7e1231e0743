"""A real store, and its every fault with the documented outcome: mended, or an error within the bound."""

import logging
import multiprocessing
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from streaming import Stream, StreamingDataset

from recipe.upstream.checked_stream import CheckedStream
from recipe.upstream.fetch import RemoteFolder
from recipe.upstream.storage import open_streams
from tests.data.storage_cases import NUM_ROWS, NUM_SHARDS, open_rows, read_numbers
from tests.launches.launch import run_composer
from tests.support.s3_server import SECRET_KEY, FaultProxy, S3Server

pytestmark = pytest.mark.usefixtures("impatience")

ALL = list(range(NUM_ROWS))
ATTEMPTS, TIMEOUT = 3, 2.0
BOUND = ATTEMPTS * TIMEOUT + 5.0  # and what the processes take
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "503": ({"kind": "status", "status": 503}, r"ClientError: .*\(503\)"),
    "500": ({"kind": "status", "status": 500}, r"ClientError: .*\(500\)"),
    "missing": ({"kind": "status", "status": 404}, r"ClientError: Object s3://rows/set/shard\.00003\.mds not found"),
    "drip": ({"kind": "drip", "bytes_per_second": 200}, r"TimeoutError: not complete after 2 s"),
    "truncate": ({"kind": "truncate"}, r"has 1133 bytes, its index says 2266"),
    "cut": ({"kind": "cut"}, "RetriesExceededError|IncompleteRead"),
    "reset": ({"kind": "reset"}, "ConnectionClosedError|not complete after 2 s"),
    "flip": ({"kind": "flip"}, r"has the xxh64 \w+, its index says \w+"),
}


def stream_into(folder: Path) -> dict[str, Any]:
    return {
        "remote": "s3://rows/set",
        "local": str(folder),
        "download_retry": ATTEMPTS,
        "download_timeout": TIMEOUT,
    }


def test_rows_of_a_store(tmp_path: Path, store: FaultProxy):
    dataset = open_rows({"remote": "s3://rows", "split": "set", "local": str(tmp_path / "cache")})
    assert read_numbers(dataset, 2) == ALL
    assert store.count("GET", "shard") == NUM_SHARDS, "each is fetched once on a node"


def test_each_process_opens_its_own_client(tmp_path: Path, store: FaultProxy):
    """Shared over a fork, Streaming's own mixes up the answers: wrong bytes or a hang in 5 of 12 runs."""
    source = RemoteFolder("s3://rows")

    def get(name: str) -> Any:
        assert source.fetch(f"set/{name}", tmp_path / name, lambda part: None, 1, 60.0)
        return source._client

    def get_in_child(inherited: Any, answers: Any) -> None:
        try:
            own = get("shard.00001.mds")
            answers.put((own is inherited, own._s3_client is inherited._s3_client, get("shard.00002.mds") is own))
        except Exception as error:  # else the test would wait for ever
            answers.put(error)

    client = get("shard.00000.mds")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=get_in_child, args=(client, answers))
    child.start()
    assert answers.get() == (False, False, True)
    child.join()
    assert get("shard.00003.mds") is client


def test_no_thread_of_a_fetch_is_left_to_fork(tmp_path: Path, store: FaultProxy, monkeypatch: pytest.MonkeyPatch):
    """Python calls a thread ended before the system has; a process forked in between may hang at an SSL context."""
    started: list[threading.Thread] = []

    class Early(threading.Thread):
        """Has ended for Python, long before it has for the system."""

        def __init__(self, **options: Any):
            super().__init__(**options)
            started.append(self)

        def is_alive(self) -> bool:
            return False

        def join(self, timeout: float | None = None) -> None:
            """Does not wait."""

    source = RemoteFolder("s3://rows")
    source.fetch("set/shard.00000.mds", tmp_path / "x", lambda part: None, 1, 60.0)  # opens the client
    monkeypatch.setattr("recipe.upstream.fetch.threading", SimpleNamespace(Thread=Early, Event=threading.Event))
    source.fetch("set/shard.00000.mds", tmp_path / "x", lambda part: None, 1, 60.0)
    (thread,) = started
    assert not Path(f"/proc/self/task/{thread.native_id}").exists()


def test_a_byte_flipped_on_the_way_is_fetched_again(tmp_path: Path, store: FaultProxy):
    store.inject("flip", "shard.00003", times=1)
    dataset = open_rows({"remote": "s3://rows/set", "local": str(tmp_path / "cache")})
    assert read_numbers(dataset) == ALL
    assert store.count("GET", "shard.00003") == 2


def test_a_byte_flipped_for_ever_ends_in_an_error_that_says_so(tmp_path: Path, store: FaultProxy):
    store.inject("flip", "shard.00003")
    cache = tmp_path / "cache"
    dataset = open_rows({"remote": "s3://rows/set", "local": str(cache)}, download_retry=3)
    expected = (
        r"the data ended after 12 of 40 samples.*shard\.00003\.mds: RuntimeError: cannot fetch "
        r"s3://rows/set/shard\.00003\.mds in 3 attempts: has the xxh64 \w+, its index says \w+"
    )
    with pytest.raises(RuntimeError, match=expected):
        read_numbers(dataset)
    assert store.count("GET", "shard.00003") == 3
    assert not list(cache.glob("*00003*")) + list(cache.glob(".*")), "nobody will take it for good"


def test_a_file_beside_the_index(tmp_path: Path, store: FaultProxy, s3: S3Server):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "records.jsonl.gz").write_bytes(b"records")
    s3.upload(tmp_path / "more", "rows", "set")
    (stream,) = open_streams({"rows": {"remote": "s3://rows/set", "local": str(tmp_path / "cache")}})
    path = stream.fetch_next_to_index("records.jsonl.gz")
    assert path is not None and path.read_bytes() == b"records"
    before = len(store.requests)
    assert stream.fetch_next_to_index("records.jsonl.gz") == path
    assert len(store.requests) == before
    assert stream.fetch_next_to_index("none.gz") is None
    assert store.count("HEAD", "none.gz") == 1, "a missing file is an answer, not a fault"
    store.inject("status", "other.gz", status=500)
    with pytest.raises(RuntimeError, match=r"other\.gz in 4 attempts: .*500"):
        stream.fetch_next_to_index("other.gz")
    (local,) = open_streams({"rows": {"local": str(tmp_path / "written")}})
    assert local.fetch_next_to_index("records.jsonl.gz") is None
    assert local.fetch_next_to_index("index.json") == tmp_path / "written" / "index.json"


def test_no_secret_is_told(
    tmp_path: Path, store: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-" + SECRET_KEY)
    stream = {"remote": "s3://rows/set", "local": str(tmp_path / "cache"), "download_retry": 2}
    caplog.set_level(logging.DEBUG, "recipe")
    with pytest.raises(RuntimeError, match=r"index\.json in 2 attempts") as error:
        open_streams({"rows": stream})
    assert "-secret-" not in f"{error.getrepr(chain=True)}{caplog.text}"
    with pytest.raises(ValueError, match="sftq") as error:
        CheckedStream(remote="sftq://user:the-password@host/folder", local=str(tmp_path))
    assert "the-password" not in str(error.value)


def test_the_bound_of_a_fetch_is_by_the_clock(tmp_path: Path, store: FaultProxy):
    """Bytes that drip never let a read time out."""
    store.inject("drip", "shard.00003", bytes_per_second=400)
    source = RemoteFolder("s3://rows/set")
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"shard\.00003\.mds in 2 attempts: TimeoutError: not complete after 0\.7 s"):
        source.fetch("shard.00003.mds", tmp_path / "shard", lambda part: None, 2, 0.7)
    assert 1.4 <= time.monotonic() - begin < 3.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_workers"),
    # In turn, and one of each kind of end with both: the store answers, the clock ends it, the bytes are wrong.
    [*zip(FAULTS, (0, 2) * 4, strict=True), ("missing", 2), ("drip", 0), ("flip", 0)],
)
def test_a_lasting_fault_names_the_shard_within_the_bound(
    tmp_path: Path, store: FaultProxy, name: str, num_workers: int
):
    settings, message = FAULTS[name]
    dataset = open_rows(stream_into(tmp_path / "cache"))
    store.inject(**settings, key="shard.00003")
    begin = time.monotonic()
    expected = r"ended after \d+ of \d+ samples.*shard\.00003\.mds: RuntimeError: cannot fetch s3://rows/set/shard"
    with pytest.raises(RuntimeError, match=rf"(?s){expected}.* in {ATTEMPTS} attempts: .*({message})"):
        read_numbers(dataset, num_workers)
    assert time.monotonic() - begin < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if name != "missing"])
def test_a_passing_fault_is_mended(tmp_path: Path, store: FaultProxy, name: str):
    dataset = open_rows(stream_into(tmp_path / "cache"))
    # More than boto asks within an attempt; but it knows nothing of wrong bytes or of the clock.
    store.inject(**FAULTS[name][0], key="shard.00003", times=2 if name in ("drip", "truncate", "flip") else 7)
    assert read_numbers(dataset, num_workers=2) == ALL
    assert all(fault.times == 0 for fault in store.faults)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_store_that_goes_down_ends_the_epoch_with_an_error(tmp_path: Path, store: FaultProxy, num_workers: int):
    dataset = open_rows(stream_into(tmp_path / "cache"), predownload=4)
    dataset[0]
    store.refuse()
    begin = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"ended after \d+ of \d+ samples.*cannot fetch s3://rows/set/shard\.\d+\.mds in 3"
    ):
        read_numbers(dataset, num_workers)
    assert time.monotonic() - begin < BOUND


@pytest.mark.slow
def test_a_store_that_comes_back_is_waited_for(tmp_path: Path, store: FaultProxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recipe.upstream.fetch.FIRST_BACKOFF", 1.0)
    dataset = open_rows({**stream_into(tmp_path / "cache"), "download_retry": 4})
    rows = iter(dataset)
    next(rows)
    store.refuse()
    time.sleep(2.0)
    store.accept()
    assert 1 + sum(1 for _ in rows) == NUM_ROWS


@pytest.mark.slow
def test_a_store_that_is_down_at_the_start_is_named_within_the_bound(tmp_path: Path, store: FaultProxy):
    store.refuse()
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"cannot fetch s3://rows/set/index\.json in 3 attempts"):
        open_streams({"rows": stream_into(tmp_path / "cache")})
    assert time.monotonic() - begin < BOUND


@pytest.mark.parametrize("kind", ["truncate", "flip"])
def test_a_broken_index_is_never_kept(tmp_path: Path, store: FaultProxy, kind: str):
    store.inject(kind, "index.json", times=1)
    assert read_numbers(open_rows(stream_into(tmp_path / "cache"))) == ALL
    store.inject(kind, "index.json")
    with pytest.raises(RuntimeError, match=r"index\.json in 3 attempts: .*is truncated or not an index"):
        open_streams({"rows": stream_into(tmp_path / "other")})
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_end_alike(tmp_path: Path, store: FaultProxy, s3: S3Server):
    for name in ("whole", "no-index", "no-shard"):
        s3.upload(tmp_path / "written", "rows", name)
    store.inject("status", "no-index/index.json", status=503)
    store.inject("status", "no-shard/shard.00003", status=503)
    output = run_composer(2, "tests/data/store_ranks.py", str(tmp_path / "cache"), timeout=240).output
    for rank in (0, 1):
        for num_workers in (0, 2):
            case = rf"rank {rank} with {num_workers} workers from"
            assert f"{case} whole: read 20 rows" in output, output
            assert re.search(rf"{case} no-index: RuntimeError: .*index\.json in 2 attempts: .*503", output), output
            reason = r"cannot fetch s3://rows/no-shard/shard\.00003\.mds in 2 attempts: .*503"
            assert re.search(rf"{case} no-shard: RuntimeError: .*cannot read .*00003\.mds: .*{reason}", output), output


@pytest.mark.slow
def test_upstream_ends_early_in_silence(tmp_path: Path, store: FaultProxy):
    """Why all this is here: remove what upstream has mended."""
    store.inject("status", "shard.00003", status=404)
    stream = Stream(remote="s3://rows/set", local=str(tmp_path / "cache"), download_retry=1, download_timeout=2.0)
    assert 0 < sum(1 for _ in StreamingDataset(streams=[stream], batch_size=4)) < NUM_ROWS
