"""`recipe.checkpoints.save`: whole, described, rotated, the best kept; a full disk stops nothing but the end."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from composer import Callback, State

from recipe.checkpoints import save as saver
from recipe.checkpoints.check import FileEntry, existing, newest_valid, parse_manifest, verify
from recipe.checkpoints.places import LocalFolder
from recipe.checkpoints.upload import upload_process
from recipe.checkpoints.write import write_file
from tests.checkpoints.checkpoint_cases import ORIGIN, AtBatch, make_saver, make_trainer, train, truncate


class Measure(Callback):
    """Pretends that an evaluation measured these values, one after each batch."""

    def __init__(self, values: list[float]):
        self.values = values

    def batch_end(self, state: State, logger: Any) -> None:
        state.eval_metric_values["box_ap50"] = self.values[int(state.timestamp.batch) - 1]
        for callback in state.callbacks:
            if callback is not self:
                callback.eval_after_all(state, logger)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """64 kB: more than three checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "other").write_bytes(bytes(max(free - leave, 0)))


def test_the_manifest_tells_every_byte(tmp_path: Path) -> None:
    train(tmp_path, 2)
    manifest = parse_manifest((tmp_path / "ba2.pt.manifest.json").read_bytes())
    content = (tmp_path / "ba2.pt").read_bytes()
    assert manifest.files["ba2.pt"].sha256 == hashlib.sha256(content).hexdigest()
    assert manifest.files["ba2.pt"].size == len(content)
    assert manifest.timestamp == {"epoch": 0, "batch": 2, "sample": 4, "token": 0}
    assert (manifest.origin, manifest.world_size, manifest.sharded) == (ORIGIN, 1, False)


def test_the_latest_link_and_no_more_files_than_told(tmp_path: Path) -> None:
    train(tmp_path, 2)
    assert os.readlink(tmp_path / "latest-rank0.pt") == "ba2.pt"
    files = {"ba1.pt", "ba2.pt", "ba1.pt.manifest.json", "ba2.pt.manifest.json", "latest-rank0.pt"}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    train(tmp_path / "whole", 5)
    train(tmp_path / "part", 5, load_path=str(tmp_path / "whole" / "ba3.pt"))
    states = [torch.load(tmp_path / name / "ba5.pt", weights_only=False)["state"] for name in ("whole", "part")]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name])
    assert states[0]["timestamp"]["Timestamp"]["sample"] == states[1]["timestamp"]["Timestamp"]["sample"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "ba7.pt.partial").write_bytes(b"half")
    train(tmp_path, 1)
    assert not list(tmp_path.glob("*.partial"))


def test_rotation_counts_earlier_launches_and_spares_valid_ones(tmp_path: Path) -> None:
    train(tmp_path, 5)
    truncate(tmp_path / "ba5.pt")
    train(tmp_path, 4, load_path=str(tmp_path / "ba2.pt"), num_checkpoints_to_keep=2)
    left = {path.name for path in tmp_path.glob("*.pt")} - {"latest-rank0.pt"}
    assert left == {"ba3.pt", "ba4.pt", "ba5.pt"}
    assert not (tmp_path / "ba1.pt.manifest.json").exists()


def test_the_best_is_kept_and_outlives_rotation_and_resume(tmp_path: Path) -> None:
    keywords: dict[str, Any] = {"metric": "eval/box_ap50", "num_checkpoints_to_keep": 1}

    def run(steps: int, values: list[float], load_path: str | None = None) -> dict[str, Any]:
        trainer = make_trainer(make_saver(tmp_path, **keywords), steps, load_path, (Measure(values),))
        trainer.fit()
        trainer.close()
        return json.loads((tmp_path / "best-rank0.pt.manifest.json").read_text())

    told = run(3, [0.2, 0.5, 0.4])
    assert (told["metric"], told["timestamp"]["batch"]) == ({"eval/box_ap50": 0.5}, 2)
    assert (
        told["files"]["best-rank0.pt"]["sha256"]
        == hashlib.sha256((tmp_path / "best-rank0.pt").read_bytes()).hexdigest()
    )
    assert {path.name for path in tmp_path.glob("ba*.pt")} == {"ba3.pt"}
    told = run(5, [0, 0, 0, 0.45, float("nan")], load_path=str(tmp_path / "ba3.pt"))
    assert told["timestamp"]["batch"] == 2, "a value below the best before the resume is not the best"
    told = run(6, [0, 0, 0, 0, 0, 0.6], load_path=str(tmp_path / "ba5.pt"))
    assert told["timestamp"]["batch"] == 6


def test_killed_before_the_best_is_kept_it_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*args: object) -> None:
        raise Killed

    def run(values: list[float]) -> None:
        found = newest_valid(str(tmp_path))
        best = make_saver(tmp_path, metric="eval/box_ap50")
        make_trainer(best, len(values), found and found.path, (Measure(values),)).fit()

    run([0.2])
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(saver.CheckpointSaver, "_keep_best", kill)
        run([0.2, 0.5, 0.4])
    run([0.2, 0.5, 0.4])
    assert json.loads((tmp_path / "best-rank0.pt.manifest.json").read_text())["timestamp"]["batch"] == 2


def test_the_best_may_be_the_least_and_must_be_measured(tmp_path: Path) -> None:
    trainer = make_trainer(make_saver(tmp_path, metric="box_ap50", mode="min"), 3, None, (Measure([3, 1, 2]),))
    trainer.fit()
    trainer.close()
    assert json.loads((tmp_path / "best-rank0.pt.manifest.json").read_text())["timestamp"]["batch"] == 2
    trainer = make_trainer(make_saver(tmp_path / "b", metric="eval/other"), 1, None, (Measure([1]),))
    with pytest.raises(ValueError, match=r"save_best.metric eval/other is measured .*: choose one of eval/box_ap50"):
        trainer.fit()
    trainer.close()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["_keep_best", "_publish", "_point_latest", "_rotate"])
@pytest.mark.parametrize("is_before", [True, False])
def test_a_kill_while_saving_loses_no_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, is_before: bool
) -> None:
    """Before and after each step of the best batch's checkpoint; the same command goes on and ends as if not killed."""
    values = [0.2, 0.5, 0.4]
    original = getattr(saver.CheckpointSaver, step)

    def killed(self: Any, state: State, *args: Any) -> None:
        if not is_before:
            original(self, state, *args)
        if state.timestamp.batch == 2:
            raise Killed
        if is_before:
            original(self, state, *args)

    def run() -> None:
        found = newest_valid(str(tmp_path))
        one = make_saver(tmp_path, metric="eval/box_ap50", num_checkpoints_to_keep=1)
        trainer = make_trainer(one, 3, None if found is None else found.path, (Measure(values),))
        trainer.fit()
        trainer.close()

    with monkeypatch.context() as patch:
        patch.setattr(saver.CheckpointSaver, step, killed)
        with pytest.raises(Killed):
            run()
    run()
    kept = parse_manifest((tmp_path / "best-rank0.pt.manifest.json").read_bytes())
    assert (kept.metric, kept.batch) == ({"eval/box_ap50": 0.5}, 2)
    assert verify(kept, tmp_path) is None
    found = newest_valid(str(tmp_path))
    assert found is not None and found.manifest.batch == 3


def test_before_and_after_the_end_of_an_epoch(tmp_path: Path) -> None:
    """Two checkpoints of one batch: the one after the epoch's end is the newer one, whatever order the disk tells."""
    train(tmp_path, 2, filename="ba{batch}-ep{epoch}.pt", save_interval="2ba")
    train(tmp_path, 4, str(tmp_path / "ba2-ep0.pt"), filename="ba{batch}-ep{epoch}.pt", save_interval="1ep")
    assert {path.name for path in tmp_path.glob("ba2*.pt")} == {"ba2-ep0.pt", "ba2-ep1.pt"}
    for path in tmp_path.glob("ba4*"):
        path.unlink()
    names = ["ba2-ep0.pt", "ba2-ep1.pt", "ba2-ep0.pt.manifest.json", "ba2-ep1.pt.manifest.json"]
    for order in (names, names[::-1]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalFolder, "names", lambda self, order=order: order)
            found = newest_valid(str(tmp_path))
        assert found is not None and Path(found.path).name == "ba2-ep1.pt"


@pytest.mark.parametrize("step", ["_write", "_publish"])
def test_a_kill_before_the_first_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """What was never finished keeps nobody from beginning, and is gone then; what was finished and lost does."""
    original = getattr(saver.CheckpointSaver, step)

    def killed(self: Any, *args: Any) -> None:
        if step == "_write":
            original(self, *args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(saver.CheckpointSaver, step, killed)
        with pytest.raises(Killed):
            train(tmp_path, 1)
    assert (tmp_path / "ba1.pt").exists() and existing(str(tmp_path)) == []
    train(tmp_path, 2, save_interval="2ba")
    assert not list(tmp_path.glob("ba1*"))
    (tmp_path / "ba2.pt.manifest.json").unlink()
    assert existing(str(tmp_path)) == ["ba2.pt"]


def test_started_anew_over_an_older_run(tmp_path: Path) -> None:
    train(tmp_path, 3)
    train(tmp_path, 2)
    found = newest_valid(str(tmp_path))
    assert found is not None and found.manifest.batch == 2, "the older run's ba3.pt must not be resumed from"
    assert (tmp_path / "ba3.pt").exists()


def test_the_best_of_another_run_is_not_this_ones(tmp_path: Path) -> None:
    for folder, steps, values in (("a", 2, [0.2, 0.9]), ("b", 4, [0, 0, 0.6, 0.5])):
        one = make_saver(tmp_path / folder, metric="eval/box_ap50")
        start = str(tmp_path / "a" / "ba2.pt") if folder == "b" else None
        trainer = make_trainer(one, steps, start, (Measure(values),))
        trainer.fit()
        trainer.close()
    assert parse_manifest((tmp_path / "b" / "best-rank0.pt.manifest.json").read_bytes()).batch == 3


def test_uploads_continue_after_sigterm() -> None:
    with upload_process() as executor:
        assert executor.submit(signal.getsignal, signal.SIGTERM).result() == signal.SIG_IGN


PARENT = """
import time
from recipe.checkpoints.upload import upload_process
if __name__ == "__main__":
    process = upload_process()
    process.submit(time.sleep, 600)
    while not process._processes:
        time.sleep(0.01)
    print(*process._processes, flush=True)
    time.sleep(600)
"""


def test_an_upload_ends_with_its_run(tmp_path: Path) -> None:
    """In the middle, so that a run that has resumed is the only one that writes."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    uploading = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    gone, _ = psutil.wait_procs([uploading], timeout=240)  # its imports come first, on a busy machine a minute
    assert gone


class Store:
    """An uploader of which every upload of a batch's file fails."""

    def __init__(self, failing: str):
        self.failing = failing
        self.futures: list[Future[int]] = []

    def init(self) -> None:
        pass

    def upload_file_async(self, remote_file_name: str, file_path: Path, overwrite: bool) -> None:
        future: Future[int] = Future()
        if self.failing in remote_file_name:
            future.set_exception(Exception("no answer from https://user:word@host"))
        else:
            future.set_result(0)
        self.futures.append(future)

    def wait_and_close(self) -> None:
        pass


def test_an_upload_that_fails_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = make_saver(tmp_path)
    one.remote_uploader = Store("ba2.pt.")  # pyright: ignore[reportAttributeAccessIssue]
    trainer = make_trainer(one, 3)
    trainer.fit()
    trainer.close()
    assert f"an upload to {tmp_path} failed: Exception: no answer from https://<redacted>@host" in caplog.text
    assert "word" not in caplog.text


def test_the_last_upload_must_succeed(tmp_path: Path) -> None:
    one = make_saver(tmp_path)
    one.remote_uploader = Store("ba3.pt.")  # pyright: ignore[reportAttributeAccessIssue]
    trainer = make_trainer(one, 3)
    with pytest.raises(RuntimeError, match=r"its last checkpoint could not be written: .*no answer"):
        trainer.fit()
    trainer.close()


def test_shards_on_another_nodes_disk_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def with_another(content: Any, path: Path) -> dict[str, FileEntry]:
        return {**write_file(content, path), "__1_0.distcp": FileEntry(1, "")}

    monkeypatch.setattr(saver, "write_file", with_another)
    trainer = make_trainer(make_saver(tmp_path), 1)
    with pytest.raises(RuntimeError, match=r"__1_0.distcp of another rank is not in .*: all nodes must share"):
        trainer.fit()
    trainer.close()
    assert newest_valid(str(tmp_path)) is None


def test_a_disk_that_is_full_before_writing(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = AtBatch(1, lambda: fill(small_disk, leave=100))
    freed = AtBatch(2, (small_disk / "other").unlink)
    trainer = make_trainer(make_saver(small_disk), 3, None, (full, freed))
    trainer.fit()
    trainer.close()
    assert {path.name for path in small_disk.glob("ba*.pt")} == {"ba1.pt", "ba3.pt"}
    assert f"no checkpoint of batch 2 could be written in {small_disk}" in caplog.text
    assert "bytes free, the checkpoint needs" in caplog.text
    assert "Training continues" in caplog.text


def test_a_disk_that_fills_while_writing(
    small_disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "num_bytes", lambda content: 0)
    trainer = make_trainer(make_saver(small_disk), 2, None, (AtBatch(1, lambda: fill(small_disk, leave=4096)),))
    with pytest.raises(RuntimeError, match=r"its last checkpoint could not be written: .*No space left.*same command"):
        trainer.fit()
    trainer.close()
    assert "No space left on device" in caplog.text
    assert {path.name for path in small_disk.iterdir()} >= {"ba1.pt", "ba1.pt.manifest.json"}
    assert {path.name for path in small_disk.glob("ba2*")} == {"ba2.pt.unfinished.partial"}, "a name, no content"
    found = newest_valid(str(small_disk))
    assert found is not None and found.manifest.batch == 1


def test_a_file_that_may_not_grow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same without a disk of its own: the system refuses to write on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    trainer = make_trainer(
        make_saver(tmp_path), 3, None, (AtBatch(1, lambda: limit(2000)), AtBatch(2, lambda: limit(soft)))
    )
    trainer.fit()
    trainer.close()
    assert {path.name for path in tmp_path.glob("ba*")} == {"ba2.pt.unfinished.partial"} | {
        name for batch in (1, 3) for name in (f"ba{batch}.pt", f"ba{batch}.pt.manifest.json")
    }
    assert "File too large" in caplog.text


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """Else the newest valid checkpoint would be one that no run can go on from."""

    class Spoil(Callback):
        def batch_end(self, state: State, logger: Any) -> None:
            if state.timestamp.batch == 2:
                torch.nn.init.constant_(next(state.model.parameters()), float("nan"))

    made = make_trainer(make_saver(tmp_path), 2, callbacks=(Spoil(),))
    with pytest.raises(RuntimeError, match="last checkpoint could not be written: its weights are not finite"):
        made.fit()
    assert not (tmp_path / "ba2.pt").exists()
    found = newest_valid(str(tmp_path))
    assert found is not None and found.manifest.batch == 1
