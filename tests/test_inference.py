"""Predictions of a batch are each sample's alone: boxes, scores, captions and answers."""

import pytest
import torch

from recipe.inference import predict_batch
from recipe.joint import JointModel
from recipe.schema import Example, Prediction
from tests.tiny_cases import NUM_QUERIES, collator


@torch.no_grad()
def predict(model: JointModel, examples: list[Example], layout: str) -> list[Prediction]:
    batch = collator(layout)(examples)
    outputs = model.eval()(batch)
    return predict_batch(
        model.model, batch, outputs.detection, outputs.memory, model.tokenizer, model.evaluation, model.prompt
    )


@pytest.mark.parametrize("layout", ["standard", "packed"])
def test_a_batch_is_each_sample_alone(tiny_model: JointModel, tiny_examples: dict[str, Example], layout: str):
    together = predict(tiny_model, list(tiny_examples.values()), layout)
    for (name, example), found in zip(tiny_examples.items(), together, strict=True):
        (alone,) = predict(tiny_model, [example], "standard")
        assert (found.id, found.answer, found.answer_objects) == (alone.id, alone.answer, alone.answer_objects), name
        assert len(found.objects) == len(alone.objects) == (0 if name == "text" else NUM_QUERIES)
        for one, other in zip(found.objects, alone.objects, strict=True):
            assert one.caption == other.caption
            assert one.score == pytest.approx(other.score, rel=1e-6)
            assert one.box == pytest.approx(other.box, rel=1e-6)
    assert len({item.caption for found in together for item in found.objects}) > 1


def test_objects_fall_in_score_and_stay_in_the_picture(tiny_model: JointModel, tiny_examples: dict[str, Example]):
    (found,) = predict(tiny_model, [tiny_examples["two"]], "standard")
    scores = [item.score for item in found.objects]
    assert scores == sorted(scores, reverse=True)
    for item in found.objects:
        x1, y1, x2, y2 = item.box
        assert 0 <= x1 <= x2 <= found.width and 0 <= y1 <= y2 <= found.height
