"""Sums of squares: float64 reference, kinds of numbers mixed, nothing at all."""

import pytest
import torch
from torch import nn

from recipe.optim.groups import named_groups, square_sums


def test_square_sums():
    generator = torch.Generator().manual_seed(0)
    lists = [
        [torch.randn(5, 3, dtype=torch.float64, generator=generator), torch.randn(2, dtype=torch.float32)],
        [],
        [torch.randn(40, generator=generator).bfloat16(), torch.empty(0)],
    ]
    expected = [sum(float(part.double().square().sum()) for part in tensors) for tensors in lists]
    found = square_sums(lists)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert found[0] == pytest.approx(expected[0], rel=1e-13)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_square_sums_keep_what_is_not_finite(value: float):
    sums = square_sums([[torch.ones(3), torch.tensor([1.0, value])], [torch.ones(4)]])
    assert not torch.isfinite(sums[0])
    assert sums[1] == 4


def test_groups_of_one_name_are_one():
    weight, bias, other = (nn.Parameter(torch.ones(size)) for size in (3, 2, 1))
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "name": "a"}, {"params": [other], "name": "b"}, {"params": [bias], "name": "a"}]
    )
    groups = named_groups(optimizer)
    assert list(groups) == ["a", "b"]
    assert groups["a"][0] is weight and groups["a"][1] is bias and groups["b"][0] is other


def test_pieces_of_another_precision_sum_to_the_whole(monkeypatch: pytest.MonkeyPatch):
    """By hand: 1 + 4 + 9 + 16 + 25, of bfloat16 values in pieces of two; of float32 values, which are taken whole."""
    monkeypatch.setattr("recipe.optim.groups._PIECE", 2)
    row = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert square_sums([[row.bfloat16()], [row]]).tolist() == pytest.approx([55.0, 55.0], rel=1e-6)
