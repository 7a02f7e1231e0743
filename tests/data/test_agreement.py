"""An error in one rank's loader is raised by all ranks at the same step."""

import sys
from pathlib import Path

import pytest
import torch
from composer.utils import dist
from torch.utils.data import Dataset

from recipe.upstream.agreement import LockstepLoader, agree
from tests.launches.launch import leave, run_composer


class Numbers(Dataset[int]):
    """0 to 9; the last rank cannot read number 6."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index == 6 and dist.get_global_rank() == dist.get_world_size() - 1:
            raise ValueError("number 6 is bad")
        return index


def outcome_of_loop() -> tuple[list[int], str]:
    seen = []
    try:
        for batch in LockstepLoader(Numbers(), batch_size=2):
            seen += batch.tolist()
    except (ValueError, RuntimeError) as error:
        return seen, f"{type(error).__name__}: {error}"
    return seen, ""


def one_rank(folder: str) -> None:
    dist.initialize_dist("cpu", timeout=60)
    outcome = outcome_of_loop()
    agree(None)  # the ranks are still in step
    torch.save(outcome, Path(folder) / f"{dist.get_global_rank()}.pt")
    leave()


@pytest.mark.world_size(2)
def test_every_rank_raises_what_one_rank_met(tmp_path: Path):
    run_composer(2, __file__, str(tmp_path), timeout=120)
    well, ill = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    seen = [0, 1, 2, 3, 4, 5]
    assert ill == (seen, "ValueError: number 6 is bad")
    assert well == (seen, "RuntimeError: rank 1: ValueError: number 6 is bad")


def test_alone_the_error_is_the_error():
    agree(None)
    with pytest.raises(KeyError, match="mine"):
        agree(KeyError("mine"))
    assert outcome_of_loop() == ([0, 1, 2, 3, 4, 5], "ValueError: number 6 is bad")


def test_what_began_it_is_told_where_the_others_never_come(monkeypatch: pytest.MonkeyPatch):
    def time_out(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("[gloo] timed out")

    monkeypatch.setattr("recipe.upstream.agreement.dist.get_world_size", lambda: 2)
    monkeypatch.setattr("recipe.upstream.agreement.torch.distributed.get_backend", lambda: "gloo")
    monkeypatch.setattr("recipe.upstream.agreement.dist.all_reduce", time_out)
    with pytest.raises(ValueError, match="worker was killed") as raised:
        agree(ValueError("worker was killed"))
    assert "timed out" in str(raised.value.__cause__)
    with pytest.raises(RuntimeError, match="timed out"):
        agree(None)


if __name__ == "__main__":
    one_rank(sys.argv[1])
