"""`recipe.checkpoints.saver`: whole, described, rotated, the best kept; a full disk stops nothing but the end."""

import hashlib
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, State

from recipe.checkpoints import saver
from recipe.checkpoints.find import newest_valid
from recipe.checkpoints.manifest import parse_manifest
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


def test_a_disk_that_is_full_before_writing(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = AtBatch(1, lambda: fill(small_disk, leave=100))
    freed = AtBatch(2, (small_disk / "other").unlink)
    trainer = make_trainer(make_saver(small_disk), 3, None, (full, freed))
    trainer.fit()
    trainer.close()
    assert {path.name for path in small_disk.glob("ba*.pt")} == {"ba1.pt", "ba3.pt"}
    assert f"no checkpoint of batch 2 could be written in {small_disk}" in caplog.text
    assert "bytes free, the checkpoint needs" in caplog.text
    assert "Training goes on" in caplog.text


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
    assert not list(small_disk.glob("ba2*")), "nothing of what was written is left"
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
    assert {path.name for path in tmp_path.glob("ba*")} == {
        name for batch in (1, 3) for name in (f"ba{batch}.pt", f"ba{batch}.pt.manifest.json")
    }
    assert "File too large" in caplog.text
