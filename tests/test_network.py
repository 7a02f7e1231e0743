"""The joint network's precision, and what its captions are trained on."""

from collections.abc import Callable

import pytest
import torch

from recipe.config import RecipeConfig
from recipe.data.collate import collate_packed
from recipe.losses.matcher import Matches
from recipe.network import padded_captions
from recipe.schema import Example, Target
from tests.tiny_cases import make_model


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_head_is_float32_at_least(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], dtype: str
) -> None:
    model = make_model(tiny_config(model={"dtype": dtype}))
    assert model.model.vlm.hf_model.dtype == getattr(torch, dtype)
    batch = collate_packed([tiny_examples["two"], tiny_examples["one"]])
    outputs = model(batch)
    assert outputs.detection.pred_boxes.dtype == torch.float32
    model.loss(outputs, batch)["total"].backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_only_matched_captions_are_trained_each_in_its_objects_slot() -> None:
    """Two images: the second object of the first found no query; the second image is not annotated."""
    target = Target(boxes=torch.rand(2, 4), caption_ids=torch.tensor([[7, 8, 2], [9, 2, -100]]))
    matches = Matches(image=torch.tensor([0]), query=torch.tensor([4]), target=torch.tensor([0]))
    labels = padded_captions([target, None], matches, torch.device("cpu"))
    assert labels.tolist() == [[[7, 8, 2], [-100] * 3], [[-100] * 3] * 2]


def test_a_batch_without_objects_still_has_one_empty_slot() -> None:
    none = Matches(*torch.zeros(3, 0, dtype=torch.int64))
    assert padded_captions([None], none, torch.device("cpu")).tolist() == [[[-100]]]
