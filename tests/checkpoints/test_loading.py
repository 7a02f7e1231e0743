"""`recipe.checkpoints.resume`: nothing in a checkpoint is run, on any of the ways that Composer loads one."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import load, save  # pyright: ignore[reportPrivateImportUsage]

from recipe.checkpoints.resume import safe_loading
from recipe.checkpoints.weights import check_file
from tests.checkpoints.checkpoint_cases import make_saver, make_trainer, train


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def change(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> str:
    content = torch.load(source, weights_only=False)
    edit(content["state"])
    torch.save(content, target)
    return str(target)


@pytest.mark.parametrize("variable", ["UNRELATED", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_harmful_object_is_refused(tmp_path: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    train(tmp_path, 1)
    ran = tmp_path / "ran"
    path = change(tmp_path / "ba1.pt", tmp_path / "bad.pt", lambda state: state.update(extra=Harmful(ran)))
    with pytest.raises(ValueError, match=r"bad.pt is not .* which could run code: refused: give another one"):
        make_trainer(make_saver(tmp_path / "new"), 1, path)
    assert not ran.exists()


def test_the_name_of_an_algorithm_is_not_evaluated(tmp_path: Path) -> None:
    """Composer evaluates `repr` where the algorithm changes the model; see `State._apply_required_algorithms`."""
    train(tmp_path, 1)
    ran = tmp_path / "ran"
    evil = {"repr": f"BlurPool() if __import__('os').mkdir({str(ran)!r}) else 0"}
    path = change(tmp_path / "ba1.pt", tmp_path / "bad.pt", lambda state: state.update(algorithms=[("BlurPool", evil)]))
    make_trainer(make_saver(tmp_path / "new"), 2, path).close()
    assert not ran.exists()


def test_a_truncated_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "short.pt").write_bytes(b"PK\x03\x04 and so on")
    with safe_loading(), pytest.raises(ValueError, match=r"short.pt is not a readable Composer .*: give another one"):
        check_file(tmp_path / "short.pt")


def test_a_genuine_index_of_shards_passes_and_a_harmful_one_does_not(tmp_path: Path) -> None:
    content = {"weight": torch.arange(4.0), "steps": 3, "names": ["a"]}
    save(content, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert check_file(tmp_path / "shards" / ".metadata")
    with safe_loading():
        found = {"weight": torch.zeros(4), "steps": 0, "names": [""]}
        load(found, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert torch.equal(found["weight"], content["weight"]) and found["steps"] == 3
    (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"\.metadata is not an index .*posix.mkdir, which could run code: refused"):
        check_file(tmp_path / "shards" / ".metadata")
    assert not (tmp_path / "ran").exists()


def test_a_harmful_shard_is_refused(tmp_path: Path) -> None:
    save({"steps": Harmful(tmp_path / "ran")}, checkpoint_id=tmp_path / "shards", no_dist=True)
    with safe_loading(), pytest.raises(BaseException, match=r"Unsupported (global|operand)|mkdir"):
        load({"steps": 0}, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert not (tmp_path / "ran").exists()


def test_the_switches_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before, known = dict(os.environ), set(torch.serialization.get_safe_globals())
    with safe_loading():
        assert os.environ != before
    assert dict(os.environ) == before
    assert set(torch.serialization.get_safe_globals()) == known
