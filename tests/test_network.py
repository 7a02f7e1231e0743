"""The joint network's precision, and what its captions are trained on."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from recipe.config import RecipeConfig
from recipe.data.collate import collate_packed
from recipe.joint import JointModel
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


def test_a_prediction_writes_no_captions_of_nothing(tiny_model: JointModel, tiny_examples: dict[str, Example]) -> None:
    """What the loss terms of an evaluation need, they still get."""
    calls: list[int] = []
    hook = tiny_model.model.caption_decoder.register_forward_hook(lambda *_: calls.append(1))
    examples = [tiny_examples["two"], replace(tiny_examples["two"], target=None)]
    with torch.no_grad():
        judged, predicted = (tiny_model.eval()(collate_packed([example])) for example in examples)
    hook.remove()
    assert len(calls) == 1
    assert torch.equal(judged.detection.pred_boxes, predicted.detection.pred_boxes)
    assert len(judged.caption_logits) and predicted.caption_logits.shape == (0, judged.caption_logits.shape[1])


def test_only_matched_captions_are_trained_each_in_its_objects_slot() -> None:
    """Two images: the second object of the first found no query; the second image is not annotated."""
    target = Target(boxes=torch.rand(2, 4), caption_ids=torch.tensor([[7, 8, 2], [9, 2, -100]]))
    matches = Matches(image=torch.tensor([0]), query=torch.tensor([4]), target=torch.tensor([0]))
    labels = padded_captions([target, None], matches, torch.device("cpu"))
    assert labels.tolist() == [[[7, 8, 2], [-100] * 3], [[-100] * 3] * 2]


def test_a_batch_without_objects_still_has_one_empty_slot() -> None:
    none = Matches(*torch.zeros(3, 0, dtype=torch.int64))
    assert padded_captions([None], none, torch.device("cpu")).tolist() == [[[-100]]]
