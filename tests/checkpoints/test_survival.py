"""Real runs, stopped and damaged: launched again by the same command they end with the weights of an unstopped one."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from recipe.checkpoints.check import newest_valid, parse_manifest, verify
from recipe.checkpoints.sigterm import PREEMPTED
from tests.checkpoints.checkpoint_cases import flip, truncate
from tests.distributed.packed_run import Settings
from tests.distributed.test_exact_resume import SCRIPT, data
from tests.launches.launch import Launch, run_composer

STEPS = 6
SHARDED = Path(__file__).with_name("sharded_run.py")
Weights = dict[str, torch.Tensor]

__all__ = ["data"]  # the fixture


@pytest.fixture
def launch(tiny_checkpoint: str, data: str, tmp_path: Path) -> Callable[..., Launch]:
    """`launch(world_size, **settings)`: a run in `tmp_path`."""

    def run(world_size: int, **changes: object) -> Launch:
        settings = Settings(tiny_checkpoint, data, str(tmp_path), str(tmp_path / "checkpoints"), steps=STEPS)
        path = tmp_path / "settings.json"
        path.write_text(json.dumps({**asdict(settings), **changes}))
        return run_composer(world_size, SCRIPT, str(path), timeout=240, check=False)

    return run


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Of two ranks that were never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    settings = Settings(tiny_checkpoint, data, str(folder), str(folder / "checkpoints"), steps=STEPS)
    (folder / "settings.json").write_text(json.dumps(asdict(settings)))
    run_composer(2, SCRIPT, str(folder / "settings.json"), timeout=240)
    return torch.load(folder / "weights.pt")


def assert_equal(folder: Path, whole: Weights) -> None:
    found = torch.load(folder / "weights.pt")
    assert all(torch.equal(found[name], value) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize(("terminate", "num_workers"), [("launcher", 2), ("rank", 0)])
def test_sigterm_saves_and_the_same_command_goes_on(
    launch: Callable[..., Launch], whole: Weights, tmp_path: Path, terminate: str, num_workers: int
) -> None:
    stopped = launch(2, terminate_at=3, terminate=terminate, num_workers=num_workers)
    assert stopped.returncode == PREEMPTED, stopped.output
    found = newest_valid(str(tmp_path / "checkpoints"))
    assert found is not None and found.manifest.batch >= 4
    assert not (tmp_path / "weights.pt").exists()
    resumed = launch(2, num_workers=num_workers)
    assert resumed.returncode == 0, resumed.output
    assert_equal(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_killed_and_its_newest_checkpoints_damaged(
    launch: Callable[..., Launch], whole: Weights, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    assert launch(2, kill_at=5).returncode != 0
    truncate(folder / "ba5.pt")
    flip(folder / "ba4.pt")
    (folder / "ba6.pt.partial").write_bytes(b"half")
    (folder / "ba3.pt.manifest.json").unlink()
    resumed = launch(2)
    assert resumed.returncode == 0, resumed.output
    assert "resuming from" in resumed.output and "ba2.pt" in resumed.output
    for name in ("ba6.pt.partial", "ba5.pt", "ba4.pt", "ba3.pt"):
        assert f"{name} is passed over" in resumed.output
    assert_equal(tmp_path, whole)
    again = launch(2)
    assert again.returncode == 0 and "has ended at 6ba already" in again.output, again.output


@pytest.mark.slow
def test_none_valid_is_refused(launch: Callable[..., Launch], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert launch(1, kill_at=1).returncode != 0
    truncate(folder / "ba1.pt")
    refused = launch(1)
    assert refused.returncode == 1
    assert "holds checkpoints but none to resume from (ba1.pt)" in refused.output


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_sharded_checkpoints_under_fsdp2(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run_composer(2, SHARDED, str(tmp_path), "4")
    whole = torch.load(tmp_path / "weights.pt")
    for name in ("best", "ep0-ba2", "ep1-ba3", "ep1-ba4"):
        manifest = parse_manifest((folder / name / "manifest.json").read_bytes())
        assert set(manifest.files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
        assert verify(manifest, folder / name) is None
        assert manifest.batch == (2 if name == "best" else int(name[-1]))
    assert (folder / "latest-rank0.pt").resolve() == folder / "ep1-ba4"
    assert not (folder / "ep0-ba1").exists(), "three are kept"
    (folder / "ep1-ba4" / "manifest.json").unlink()
    flip(folder / "ep1-ba3" / "__1_0.distcp")
    (tmp_path / "weights.pt").unlink()
    resumed = run_composer(2, SHARDED, str(tmp_path), "4")
    assert f"starts from {folder}/ep0-ba2" in resumed.output
    assert_equal(tmp_path, whole)
