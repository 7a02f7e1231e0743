"""Checkpoints in a real S3 server: kills, pruning, a dead upload process, and how often they are read."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from recipe.checkpoints import resume, upload
from recipe.checkpoints.check import UNFINISHED, FileEntry, Manifest, existing, newest_valid, write_manifest
from recipe.checkpoints.places import StoreFolder
from recipe.checkpoints.save import CheckpointSaver
from recipe.checkpoints.upload import Uploads
from recipe.config import RecipeConfig
from recipe.upstream.trainer_section import view_trainer
from tests.checkpoints.checkpoint_cases import ORIGIN, AtBatch, make_saver, make_trainer, train
from tests.checkpoints.test_survival import SHARDED, assert_equal
from tests.launches.launch import run_composer
from tests.support.s3_server import FaultProxy, S3Server

BUCKET = "checkpoints"


@pytest.fixture
def proxy(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Before the server; the environment points to it, and the bucket is there."""
    (tmp_path / "empty").mkdir()
    s3.upload(tmp_path / "empty", BUCKET)
    with FaultProxy(s3.endpoint) as one:
        for name, value in one.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield one


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process imports torch again: uploads are a thread's."""
    monkeypatch.setattr(upload, "upload_process", lambda: ThreadPoolExecutor(1))


@pytest.fixture
def address(proxy: FaultProxy, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}"


def stored(address: str) -> set[str]:
    """The names of all objects, but that by which Composer tries the credentials."""
    return {name for name in StoreFolder(address).names() if not name.startswith(".credentials")}


def files(*batches: int) -> set[str]:
    names = [f"ba{batch}.pt" for batch in batches]
    return {*names, *(f"{name}.manifest.json" for name in names), "latest-rank0.pt.symlink"}


def start_of(address: str) -> dict[str, Any]:
    """What a run with this folder would start from."""
    view = view_trainer(RecipeConfig(trainer={"save_folder": address}))
    return resume.load_keywords(view, None, autoresume=True, origin=ORIGIN)


def leave_unfinished(address: str, proxy: FaultProxy, steps: int, **keywords: Any) -> None:
    """As a kill between the first file and the manifest of the last batch does."""
    proxy.inject("status", f"ba{steps}.pt.manifest.json", times=None)
    with pytest.raises(RuntimeError, match="its last checkpoint could not be written"):
        train(address, steps, **keywords)
    proxy.faults.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_killed_before_the_manifest_of_the_first(address: str, proxy: FaultProxy) -> None:
    """The next run starts without a human; it overwrites what was left, or removes it."""
    leave_unfinished(address, proxy, 1)
    assert {"ba1.pt", "ba1.pt.unfinished.partial"} <= stored(address) - {"latest-rank0.pt.symlink"}
    assert existing(address) == [] and start_of(address)["load_path"] is None
    train(address, 2, save_interval="2ba")
    assert stored(address) == files(2)
    leave_unfinished(address, proxy, 1)
    train(address, 1)
    assert {name for name in stored(address) if name.startswith("ba1.pt")} == {"ba1.pt", "ba1.pt.manifest.json"}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_killed_before_the_manifest_of_a_later_one(
    address: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    leave_unfinished(address, proxy, 3)
    found = newest_valid(address)
    assert found is not None and found.path == f"{address}/ba2.pt"
    assert "ba3.pt is skipped: no manifest" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_checkpoint_from_elsewhere_is_not_overwritten(address: str, s3: S3Server, tmp_path: Path) -> None:
    """Only the marker says that a file without a manifest may go."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "ba1.pt").write_bytes(b"not ours")
    s3.upload(tmp_path / "foreign", BUCKET, address.removeprefix(f"s3://{BUCKET}/"))
    with pytest.raises(ValueError, match=r"holds checkpoints but none to resume from \(ba1.pt\)"):
        start_of(address)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_old_ones_are_pruned(address: str) -> None:
    """Those of earlier launches too; on the disk one is left."""
    train(address, 3)
    assert stored(address) == files(1, 2, 3)
    one = make_saver(address, num_checkpoints_to_keep=2)
    trainer = make_trainer(one, 5, f"{address}/ba3.pt")
    trainer.fit()
    assert [path.name for path in Path(one.folder).glob("*.pt") if not path.is_symlink()] == ["ba5.pt"]
    trainer.close()
    assert stored(address) == files(4, 5) and not Path(one.folder).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_none_is_pruned_for_one_that_did_not_arrive(address: str, proxy: FaultProxy) -> None:
    leave_unfinished(address, proxy, 2, num_checkpoints_to_keep=1)
    assert {"ba1.pt", "ba1.pt.manifest.json"} <= stored(address)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_started_over_above_an_older_run(address: str) -> None:
    """Else the next start would resume from the run that was replaced."""
    train(address, 3)
    train(address, 2)
    found = newest_valid(address)
    assert found is not None and found.manifest.batch == 2
    assert "ba3.pt.manifest.json.replaced" in stored(address)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_read_once(address: str, proxy: FaultProxy) -> None:
    """What was downloaded to be verified is loaded; it is removed afterwards."""
    train(address, 3)
    whole = train(address, 5)
    proxy.requests.clear()
    start = start_of(address)
    folder = Path(start["load_path"]).parent
    one = make_saver(address)
    trainer = make_trainer(one, 5, start["load_path"])
    assert trainer.state.timestamp.batch == 5
    downloads = [path for method, path in proxy.requests if method == "HEAD" and path.endswith(".pt")]
    assert [path.rpartition("/")[2] for path in downloads] == ["ba5.pt"], "each begins with a HEAD"
    for name, value in whole.state.model.state_dict().items():
        assert torch.equal(value, trainer.state.model.state_dict()[name])
    assert folder.exists()
    resume.catch_up(trainer, one, {**start, "load_weights_only": False})
    assert not folder.exists()
    trainer.close()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_damaged_download_is_not_kept(address: str, proxy: FaultProxy) -> None:
    train(address, 2)
    proxy.inject("flip", "ba2.pt?", times=None)
    proxy.inject("flip", "ba2.pt", times=2)  # the size, then the content
    start = start_of(address)
    assert Path(start["load_path"]).name == "ba1.pt"
    assert {path.name for path in Path(start["load_path"]).parent.iterdir()} == {"ba1.pt", "ba1.pt.manifest.json"}


@pytest.mark.slow
@pytest.mark.drill
@pytest.mark.world_size(4)
def test_each_node_reads_its_own_shards(address: str, proxy: FaultProxy, tmp_path: Path) -> None:
    """Two ranks save; then each is a node, of which none reads all. A broken shard sends all to the checkpoint before.

    Each download begins with a HEAD.
    """

    def run(steps: int, *more: str, world_size: int = 2) -> tuple[str, Counter[str]]:
        proxy.requests.clear()
        launch = run_composer(world_size, SHARDED, str(tmp_path), str(steps), *more)
        reads = [path.partition("?")[0].split("/")[-2:] for method, path in proxy.requests if method == "HEAD"]
        return launch.output, Counter("/".join(path) for path in reads if path[-1].endswith((".distcp", ".metadata")))

    run(4)
    whole = torch.load(tmp_path / "weights.pt")
    run(3, address)
    output, reads = run(4, address, "--nodes")
    assert f"starts from {address}/ep1-ba3" in output
    # The first file also holds what all ranks share.
    assert reads == {"ep1-ba3/__0_0.distcp": 2, "ep1-ba3/__1_0.distcp": 1, "ep1-ba3/.metadata": 2}
    assert_equal(tmp_path, whole)
    proxy.inject("flip", "ep1-ba4/__1_0.distcp", times=None)
    proxy.inject("flip", "ep1-ba3/__0_0.distcp", times=None)
    output, reads = run(4, address, "--nodes")
    assert f"{address}/ep1-ba4 is skipped: __1_0.distcp has another SHA-256" in output
    assert f"{address}/ep1-ba3 is skipped: __0_0.distcp has another SHA-256" in output
    assert f"starts from {address}/ep0-ba2" in output
    assert_equal(tmp_path, whole)
    proxy.faults.clear()
    run(5)
    whole = torch.load(tmp_path / "weights.pt")
    output, _ = run(5, address, "--nodes", world_size=4)
    assert f"starts from {address}/ep1-ba4" in output
    found = torch.load(tmp_path / "weights.pt")
    assert all(torch.allclose(found[name], value, rtol=0, atol=1e-7) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_copy_that_cannot_be_uploaded_goes(address: str, proxy: FaultProxy) -> None:
    """A store that is down for a night must not fill the disk."""
    one = make_saver(address)
    trainer = make_trainer(one, 4)
    proxy.inject("status", ".pt", times=None)
    with pytest.raises(RuntimeError, match="its last checkpoint could not be written"):
        trainer.fit()
    assert one.remote_uploader is not None
    assert list(Path(one.remote_uploader._upload_staging_folder).iterdir()) == []
    proxy.faults.clear()
    trainer.close()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_every_checkpoint_makes_room_and_the_last_one_waits(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[bool] = []
    monkeypatch.setattr(Uploads, "make_room", lambda self, is_last: waits.append(is_last))
    train(address, 3)
    assert waits == [False, False, True]


def test_training_waits_for_a_slow_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two checkpoints are on the disk at once: one that is uploaded and the next."""
    monkeypatch.setattr(upload, "upload_process", lambda: ThreadPoolExecutor(1))
    uploads, is_slow = Uploads(StoreFolder("s3://bucket/run"), timeout=1), threading.Event()

    def submit(number: int) -> None:
        (tmp_path / f"{number}").touch()
        keywords = {"remote_file_name": f"run/{number}", "local_file_path": f"{tmp_path}/{number}"}
        uploads.submit(lambda **_: int(is_slow.wait()), **keywords)

    for number in range(2):
        uploads.make_room()
        submit(number)
    monkeypatch.setattr(upload, "PATIENCE", 0.1)
    with pytest.raises(OSError, match="uploads of earlier checkpoints have not ended"):
        uploads.make_room()
    third = threading.Thread(target=lambda: uploads.make_room(is_last=True))
    third.start()
    third.join(0.3)
    assert third.is_alive() and "take longer than trainer.save_interval: training waits" in caplog.text
    is_slow.set()
    third.join(10)
    assert not third.is_alive() and not (tmp_path / "0").exists()
    uploads.shutdown()


def kill_uploads(saver: CheckpointSaver) -> None:
    assert saver._uploads is not None
    until = time.monotonic() + 30
    while not (processes := list(saver._uploads._process._processes)):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(processes[0], signal.SIGKILL)


@pytest.mark.slow
def test_a_saver_starts_no_process_before_it_uploads(address: str) -> None:
    """Composer's manager of one flag would outlive a killed rank, with 0.8 GB."""
    before = psutil.Process().children()
    one = make_saver(address)
    assert one.remote_uploader is not None and not one.remote_uploader.is_remote_upload_failed.is_set()
    assert psutil.Process().children() == before
    one.post_close()


@pytest.mark.slow
def test_a_killed_upload_process_is_replaced(address: str, caplog: pytest.LogCaptureFixture) -> None:
    one = make_saver(address)
    trainer = make_trainer(one, 3, None, (AtBatch(1, lambda: kill_uploads(one)),))
    trainer.fit()
    trainer.close()
    assert stored(address) == files(1, 2, 3)
    assert "the process that uploads checkpoints was killed" in caplog.text and "1 of 3 times" in caplog.text


class Dying:
    """A process that is killed in every upload."""

    def submit(self, work: Any, **keywords: Any) -> Any:
        raise BrokenProcessPool

    def shutdown(self, wait: bool) -> None:
        pass


def test_an_upload_process_that_dies_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "upload_process", Dying)
    uploads = Uploads(StoreFolder("s3://bucket/run"), timeout=1)
    (tmp_path / "file").touch()
    future = uploads.submit(int, remote_file_name="run/ba1.pt", local_file_path=str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"uploads checkpoints was killed, .*, 4 times in a row"):
        future.result()
    uploads.shutdown()


FAILING = """
import sys, time
from pathlib import Path
from recipe.checkpoints.places import StoreFolder
from recipe.checkpoints.upload import Uploads

def upload(remote_file_name, local_file_path):
    time.sleep(0.2)
    Path(f"{local_file_path}.sent").touch()

if __name__ == "__main__":
    uploads = Uploads(StoreFolder("s3://bucket/run"), timeout=60)
    for name in "abc":
        uploads.submit(upload, remote_file_name=f"run/{name}", local_file_path=f"{sys.argv[1]}/{name}")
    try:
        raise OSError("a node is lost")
    except OSError:
        uploads.finish()
        raise
"""


def test_what_waits_is_uploaded_if_training_fails(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    (tmp_path / "store").mkdir()
    done = subprocess.run([sys.executable, script, tmp_path / "store"], capture_output=True, text=True)
    assert done.returncode == 1 and "a node is lost" in done.stderr
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["a.sent", "b.sent", "c.sent"], done.stderr


def test_without_its_marker_no_file_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill would leave a file that counts as a broken checkpoint. The next one of the same name begins again."""
    uploaded: list[str] = []
    failing = True

    def run(self: Uploads, work: Any, keywords: dict[str, Any], path: Path) -> int:
        if failing and keywords["remote_file_name"].endswith(UNFINISHED):
            raise OSError("the store is down")
        uploaded.append(keywords["remote_file_name"])
        return 0

    monkeypatch.setattr(Uploads, "_run", run)
    monkeypatch.setattr(StoreFolder, "remove", lambda self, name: None)
    uploads = Uploads(StoreFolder("s3://bucket/run"), timeout=1)
    names = [f"run/ba1.pt{UNFINISHED}", "run/ba1.pt", "run/latest-rank0.pt.symlink", "run/ba2.pt"]
    copy = str(tmp_path / "copy")
    futures = [uploads.submit(int, remote_file_name=name, local_file_path=copy) for name in names]
    with pytest.raises(OSError, match=r"ba1.pt is not uploaded, because .* could not be"):
        futures[1].result(5)
    assert futures[3].result(5) == 0 and uploaded == names[2:]
    failing = False
    for name in names[:2]:
        assert uploads.submit(int, remote_file_name=name, local_file_path=copy).result(5) == 0
    uploads.shutdown()


def test_a_manifest_waits_for_files_of_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, int] = {"ep0-ba1/__0_0.distcp": 3}
    monkeypatch.setattr(StoreFolder, "size", lambda self, name: there.get(name))
    monkeypatch.setattr(StoreFolder, "remove", lambda self, name: None)
    monkeypatch.setattr(upload, "LOOK", 0.02)
    entries = {name: FileEntry(3, "") for name in ("__0_0.distcp", "__1_0.distcp")}
    manifest = Manifest(entries, {"epoch": 0, "batch": 1}, ORIGIN, 2, True, False, {})
    write_manifest(manifest, tmp_path / "manifest.json")
    name = {"remote_file_name": "run/ep0-ba1/manifest.json", "local_file_path": str(tmp_path / "manifest.json")}
    uploads = Uploads(StoreFolder("s3://bucket/run"), timeout=30)
    monkeypatch.setattr(Uploads, "_run", lambda self, work, keywords, path: 7)
    future = uploads.submit(int, **name)
    time.sleep(0.2)
    assert not future.done()
    there["ep0-ba1/__1_0.distcp"] = 3
    assert future.result(5) == 7
    there["ep0-ba1/__1_0.distcp"] = 2
    write_manifest(manifest, tmp_path / "manifest.json")
    late = Uploads(StoreFolder("s3://bucket/run"), timeout=0.1)
    with pytest.raises(OSError, match=r"no manifest is written for ep0-ba1, because .*__1_0.distcp has 2 of 3 bytes"):
        late.submit(int, **name).result(5)
    for one in (uploads, late):
        one.shutdown()
