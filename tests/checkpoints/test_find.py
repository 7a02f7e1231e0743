"""`recipe.checkpoints.check`: the newest checkpoint that is as it was written; the others are told."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipe.checkpoints.check import differences, existing, newest_valid, parse_manifest, write_manifest
from tests.checkpoints.checkpoint_cases import flip, train, truncate
from tests.support.s3_server import S3Server


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of four batches."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoints"
    train(folder, 4)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(trained, tmp_path / "checkpoints", symlinks=True))


def batch_found(folder: Path | str) -> int | None:
    found = newest_valid(str(folder))
    return None if found is None else found.manifest.batch


def test_the_newest_of_all_is_found(folder: Path) -> None:
    found = newest_valid(str(folder))
    assert found is not None
    assert (found.path, found.manifest.batch) == (str(folder / "ba4.pt"), 4)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: truncate(folder / "ba4.pt"), "ba4.pt has "),
        (lambda folder: flip(folder / "ba4.pt"), "ba4.pt has another SHA-256"),
        (lambda folder: (folder / "ba4.pt").unlink(), "ba4.pt is missing"),
        (lambda folder: (folder / "ba4.pt.manifest.json").unlink(), "ba4.pt is skipped: no manifest"),
        (lambda folder: truncate(folder / "ba4.pt.manifest.json"), "its manifest cannot be read"),
        (lambda folder: flip(folder / "ba4.pt.manifest.json"), "its manifest cannot be read"),
    ],
)
def test_a_broken_one_is_told_and_passed_over(
    folder: Path, damage: Callable[[Path], object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder)
    assert batch_found(folder) == 3
    assert reason in caplog.text and str(folder / "ba4.pt") in caplog.text


def test_a_manifest_that_still_reads_but_was_changed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "ba1.pt.manifest.json"
    path.write_text(path.read_text().replace('"batch": 1', '"batch": 9'))
    assert batch_found(folder) == 4
    assert "ba1.pt is skipped: its manifest cannot be read: its own checksum is wrong" in caplog.text


@pytest.mark.parametrize("name", ["../ba4.pt", "/ba4.pt", "a/../../ba4.pt"])
def test_a_manifest_of_a_stranger_names_files_of_its_folder_alone(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """From a store they would be downloaded to there."""
    path = folder / "ba4.pt.manifest.json"
    manifest = parse_manifest(path.read_bytes())
    write_manifest(replace(manifest, files={name: manifest.files["ba4.pt"]}), path)
    assert batch_found(folder) == 3
    assert "ba4.pt is skipped: its manifest cannot be read: it names a file outside its folder" in caplog.text


def test_several_broken_ones(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    truncate(folder / "ba4.pt")
    flip(folder / "ba3.pt")
    (folder / "ba5.pt.partial").write_bytes(b"half")
    assert batch_found(folder) == 2
    assert len(caplog.records) == 3
    assert "ba5.pt.partial is skipped: its run ended while it was being written" in caplog.text


def test_the_lying_link_does_not_matter(folder: Path) -> None:
    (folder / "latest-rank0.pt").unlink()
    assert batch_found(folder) == 4
    (folder / "latest-rank0.pt").symlink_to("ba1.pt")
    assert batch_found(folder) == 4


def test_none_valid_is_not_none_there(folder: Path, tmp_path: Path) -> None:
    for batch in range(1, 5):
        truncate(folder / f"ba{batch}.pt")
    assert batch_found(folder) is None
    assert existing(str(folder)) == ["ba1.pt", "ba2.pt", "ba3.pt", "ba4.pt"]
    assert existing(str(tmp_path / "nowhere")) == []


def test_weights_alone_are_not_resumed_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, 1, weights_only=True)
    assert batch_found(tmp_path) is None
    assert "it holds only weights" in caplog.text


def test_another_programs_checkpoint_is_passed_over(tmp_path: Path) -> None:
    torch.save({"state": {}}, tmp_path / "ba9.pt")
    train(tmp_path, 1)
    assert batch_found(tmp_path) == 1


def test_which_keys_differ() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {}}
    new = {"a": {"b": 2, "c": [1, 2]}, "e": {}, "f": 3}
    assert differences(old, new) == ["a.b: 1 -> 2", "d: None -> absent", "f: absent -> 3"]


def test_in_a_store(trained: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    folder = Path(shutil.copytree(trained, tmp_path / "checkpoints", symlinks=True))
    (folder / "latest-rank0.pt").unlink()
    flip(folder / "ba4.pt")
    (folder / "ba3.pt").unlink()
    address = s3.upload(folder, "found", "run/checkpoints")
    found = newest_valid(address)
    assert found is not None
    assert (found.path, found.manifest.batch) == (f"{address}/ba2.pt", 2)
    assert existing(address) == ["ba1.pt", "ba2.pt", "ba3.pt", "ba4.pt"]
    assert existing("s3://found/empty") == []
