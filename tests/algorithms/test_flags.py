"""What a microbatch's flags tell of its values and of the gradients of its outputs."""

from math import inf, nan

import pytest
import torch

from recipe.algorithms.watch import MicrobatchFlags


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_that_are_not_finite_are_named(dtype: torch.dtype):
    greatest = torch.finfo(dtype).max
    flags = MicrobatchFlags(["a"])
    flags.add({"large": torch.full((3, 2), greatest, dtype=dtype), "total": torch.tensor(1.0)})
    assert (float(flags.count()), flags.names()) == (0, [])
    for name, value in (("nan", nan), ("inf", inf), ("-inf", -inf)):
        flags.add({name: torch.tensor([0.0, value, -greatest], dtype=dtype)})
    assert (float(flags.count()), flags.names()) == (3, ["nan", "inf", "-inf"])


def test_gradients_of_outputs_are_named_once_they_are_there():
    inputs = torch.tensor([1.0, 0.0], requires_grad=True)
    outputs = {"root": inputs * 1, "square": inputs * 1, "unused": inputs * 1, "constant": torch.ones(2)}
    flags = MicrobatchFlags(["a"])
    flags.add(outputs)
    flags.add_gradients(outputs)
    assert flags.names() == []
    (outputs["root"].sqrt().sum() + outputs["square"].square().sum()).backward()
    assert flags.names() == ["gradient of root"]
