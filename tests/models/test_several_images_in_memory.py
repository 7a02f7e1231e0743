"""The head on one image of a chat of several: it reads that image's tokens and the words before the first answer."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from recipe.boxes import asks_for_boxes
from recipe.config import RecipeConfig
from recipe.joint import JointModel
from recipe.prediction import decode
from recipe.schema import Example, Prediction, Role, Sample
from tests.support.tiny_cases import CHAT_IN_TURNS, collator, make_encoder, make_samples


def detect(model: JointModel, examples: list[Example]) -> list[Prediction]:
    decoding = decode.Decoding(model.tokenizer, model.evaluation, model.prompt)
    return decode.predict(model.eval().model, collator("packed")(examples), decoding)[1]


def test_a_row_holds_the_tokens_of_its_image_and_the_prompt(tiny_model: JointModel, tiny_examples: dict[str, Example]):
    """Three images of 2 x 2, 4 x 4 and 3 x 3 tokens; the same prompt of the first question alone for all."""
    example, network = tiny_examples["in_turns"], tiny_model.eval().model
    batch = collator("packed")([tiny_examples["two"], example])
    with torch.no_grad():
        outputs = tiny_model(batch)
        states = network._run_trunk(batch)
        rows = [row for row, owner in enumerate(batch["student_samples"]) if owner == 1]
        assert len(rows) == 3
        length = example.prompt_length
        start = len(tiny_examples["two"].input_ids)
        prompt = states.last_hidden_state[start : start + length]
        for row, side, image in zip(rows, (2, 4, 3), batch["student_images"].tolist()[1:], strict=True):
            assert int(outputs.memory.mask[row].sum()) == side**2 + length
            grid = [(side, side)]
            own = network.memory(
                [states.image_features[image]],
                grid,
                prompt[None],
                torch.ones(1, length, dtype=torch.bool),
                [states.patch_features[image]],
                network._student_pixels(batch, batch["image_grid_thw"].tolist(), [image]),
            )
            torch.testing.assert_close(outputs.memory.tokens[row][outputs.memory.mask[row]], own.tokens[0])
            alone, _ = network.detection_head(own, None)
            # measured: 8.9e-16
            assert float((outputs.detection.pred_boxes[row] - alone.pred_boxes[0]).abs().max()) <= 1e-12


def test_no_answer_changes_a_box_of_any_image(tiny_model: JointModel, tiny_examples: dict[str, Example]):
    """Each of the three answers, and the questions after the first answer: to the bit."""
    example = tiny_examples["in_turns"]
    special = int(example.input_ids[example.roles != Role.NONE].max())  # the end of a turn
    answers = (example.roles == Role.STUDENT) & (example.input_ids != special)
    later = torch.arange(len(example.input_ids)) >= example.prompt_length
    words = later & (example.input_ids < 300)
    with torch.no_grad():
        before = tiny_model.eval()(collator("standard")([example])).detection
        for changed in (answers, words):
            ids = torch.where(changed, (example.input_ids + 11) % 200 + 20, example.input_ids)
            assert not torch.equal(ids, example.input_ids)
            after = tiny_model(collator("standard")([replace(example, input_ids=ids)])).detection
            assert torch.equal(before.pred_boxes, after.pred_boxes)
            assert torch.equal(before.pred_objectness, after.pred_objectness)


def test_the_answer_is_that_of_the_first_question(
    tiny_model: JointModel, tiny_examples: dict[str, Example], tiny_config: Callable[..., RecipeConfig]
):
    """Images after the first answer are not shown: the answer is that of a sample of the first image and question."""
    whole = make_samples()["in_turns"]
    first = Sample("first", whole.image, whole.width, whole.height, (), CHAT_IN_TURNS[:1])
    (alone,) = detect(tiny_model, [make_encoder(tiny_config())(first)])
    found = detect(tiny_model, [tiny_examples["in_turns"], tiny_examples["one"]])
    assert [item.id for item in found[:3]] == ["in_turns#1", "in_turns#2", "in_turns#3"]
    assert [item.answer for item in found[:3]] == [alone.answer, None, None] and alone.answer != found[3].answer


def test_boxes_of_an_answer_are_read_on_the_image_that_it_is_about(
    tiny_model: JointModel, tiny_examples: dict[str, Example], monkeypatch: pytest.MonkeyPatch
):
    """The first answer of `several` is a box of its first image, which is annotated; that of `in_turns` is words."""
    text = '[{"bbox_2d": [0, 0, 42, 84], "label": "x"}]'
    monkeypatch.setattr(decode, "_answers", lambda *_: {0: (text, False), 1: (text, False), 2: (text, False)})
    found = detect(tiny_model, [tiny_examples[name] for name in ("several", "in_turns", "one")])
    read = {item.id: item.answer_objects for item in found if item.answer_objects is not None}
    boxes = {name: [item.box for item in objects] for name, objects in read.items()}
    assert boxes == {"several#1": [(0.0, 0.0, 42.0, 84.0)], found[-1].id: [(0.0, 0.0, 42.0, 84.0)]}
    views = [view for name in ("several", "in_turns") for view in make_samples()[name].per_image()]
    assert [asks_for_boxes(view) for view in views] == [True, False, False, False, False]
    assert [item.id for item in found if item.answer == text] == ["several#1", "in_turns#1", found[-1].id]
