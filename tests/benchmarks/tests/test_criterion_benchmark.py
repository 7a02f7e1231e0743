"""Check `tests/benchmarks/criterion.py`: both criteria agree on one small case, and it ends with its line of JSON."""

import json
from collections.abc import Iterator

import pytest
import torch

import criterion
from criterion import Case, main, ours, run, theirs

LARGEST_DIFFERENCE = 1e-7  # of the largest entry; 3.5e-9 was the most of 40 cases


@pytest.fixture(autouse=True)
def threads_are_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criterion, "SIZES", ((2, 70), (3, 65)))


@pytest.mark.parametrize("seed", range(3))
def test_both_criteria_agree(seed: int) -> None:
    case = Case(3, 70, num_layers=2, seed=seed)
    (_, our_gradient, our_pairs), (_, their_gradient, their_pairs) = run(ours, case), run(theirs, case)
    assert our_pairs == their_pairs
    assert [len(layer) for layer in our_pairs] == [case.num_objects] * 2
    assert our_gradient.shape == (2 * 3 * 70 * (4 + 1),)
    assert (our_gradient - their_gradient).abs().max() <= LARGEST_DIFFERENCE * their_gradient.abs().max()


@pytest.mark.usefixtures("small_sizes")
def test_it_ends_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--repeats", "1", "--num-layers", "2"])
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert figures.keys() == {"speedup_over_hf", "same_assignments", "max_grad_diff"}
    assert figures["same_assignments"] is True
    assert figures["speedup_over_hf"] > 0 <= figures["max_grad_diff"] <= LARGEST_DIFFERENCE
    assert "2 images, 70 queries" in lines[0]
    assert ["2 images x 70 queries" in lines[2], "3 images x 65 queries" in lines[3]] == [True, True]
