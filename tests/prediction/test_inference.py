"""Predictions of a batch are each sample's alone: boxes, scores, captions and answers."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_iou

from recipe.config import EvaluationConfig
from recipe.joint import JointModel, all_scores
from recipe.metrics.scorers import MeteorLite
from recipe.prediction import decode
from recipe.prediction.decode import Decoding, eos_token_id, generate_captions, rank_queries
from recipe.schema import CaptionPlaces, DetectionOutputs, Example, Prediction
from tests.support.memories import of_image
from tests.support.tiny_cases import NUM_QUERIES, OTHER_FAMILIES, collator


@torch.no_grad()
def predict(
    model: JointModel, examples: list[Example], layout: str, evaluation: EvaluationConfig | None = None
) -> list[Prediction]:
    batch = collator(layout)(examples)
    decoding = Decoding(model.tokenizer, evaluation or model.evaluation, model.prompt)
    return decode.predict(model.eval().model, batch, decoding)[1]


@pytest.mark.parametrize("layout", ["standard", "packed"])
def test_a_batch_is_each_sample_alone(tiny_model: JointModel, tiny_examples: dict[str, Example], layout: str):
    together = predict(tiny_model, list(tiny_examples.values()), layout)
    apart = [found for example in tiny_examples.values() for found in predict(tiny_model, [example], "standard")]
    assert [found.id for found in together if "#" in found.id] == [
        "several#1",
        "in_turns#1",
        "in_turns#2",
        "in_turns#3",
    ]
    for found, alone in zip(together, apart, strict=True):
        assert (found.id, found.answer, found.answer_objects) == (alone.id, alone.answer, alone.answer_objects)
        assert len(found.objects) == len(alone.objects) == (0 if found.id == "text" else NUM_QUERIES)
        for one, other in zip(found.objects, alone.objects, strict=True):
            assert one.caption == other.caption
            assert one.score == pytest.approx(other.score, rel=1e-6)
            assert one.box == pytest.approx(other.box, rel=1e-6)
    assert len({item.caption for found in together for item in found.objects}) > 1


@torch.no_grad()
def test_a_caption_is_that_of_its_own_query(tiny_model: JointModel, tiny_examples: dict[str, Example]) -> None:
    """Written for one query alone, from its features and its box."""
    names = ["two", "crowded"]
    batch = collator("standard")([tiny_examples[name] for name in names])
    network, outputs = tiny_model.model, tiny_model.eval()(batch)
    predictions = predict(tiny_model, [tiny_examples[name] for name in names], "standard")
    for row, prediction in enumerate(predictions):
        memory = of_image(outputs.memory, row)
        order = outputs.detection.pred_objectness[row].argsort(descending=True, stable=True).tolist()
        for item, query in zip(prediction.objects, order, strict=True):
            one = (slice(row, row + 1), query)
            found_by = (outputs.detection.query_features[one], outputs.detection.pred_boxes[one])
            places = CaptionPlaces(torch.tensor([0]), torch.tensor([0]), 1, 1)
            end = eos_token_id(tiny_model.tokenizer)
            words = network.vlm.embed_tokens, network.vlm.logits
            ids = generate_captions(network.caption_decoder, *found_by, places, memory, *words, end)
            assert item.caption == tiny_model.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert len({item.caption for prediction in predictions for item in prediction.objects}) > 2


@OTHER_FAMILIES
def test_other_families(tiny_model: JointModel, tiny_examples: dict[str, Example]) -> None:
    """Answers and captions."""
    test_a_batch_is_each_sample_alone(tiny_model, tiny_examples, "packed")
    test_a_caption_is_that_of_its_own_query(tiny_model, tiny_examples)


def test_objects_fall_in_score_and_stay_in_the_picture(tiny_model: JointModel, tiny_examples: dict[str, Example]):
    (found,) = predict(tiny_model, [tiny_examples["two"]], "standard")
    scores = [item.score for item in found.objects]
    assert scores == sorted(scores, reverse=True)
    for item in found.objects:
        x1, y1, x2, y2 = item.box
        assert 0 <= x1 <= x2 <= found.width and 0 <= y1 <= y2 <= found.height


def detected(boxes: list[list[list[float]]], logits: list[list[float]]) -> DetectionOutputs:
    """`boxes` as xywh of the upper left corner, in tenths of the image."""
    corners = torch.tensor(boxes) / 10
    centers = torch.cat([corners[..., :2] + corners[..., 2:] / 2, corners[..., 2:]], -1)
    return DetectionOutputs(centers, torch.tensor(logits), centers)


def test_nms_by_hand() -> None:
    """Image 0: 2 is the best and 0 has an IoU of 2/3 with it; 1 and 3 are one box. Image 1: no two overlap."""
    doubled = [[0.0, 0.0, 4.0, 5.0], [6.0, 6.0, 2.0, 2.0], [0.0, 0.0, 6.0, 5.0], [6.0, 6.0, 2.0, 2.0]]
    apart = [[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 2.0, 2.0], [0.0, 4.0, 2.0, 2.0], [5.0, 5.0, 4.0, 4.0]]
    detection = detected([doubled, apart], [[1.0, -1.0, 2.0, -2.0], [0.0, 1.0, 1.0, 3.0]])
    plain = rank_queries(detection, EvaluationConfig())
    assert plain.queries.tolist() == [[2, 0, 1, 3], [3, 1, 2, 0]]
    assert plain.num_objects.tolist() == [4, 4]
    for nms_iou, expected in ((0.6, [2, 1]), (0.7, [2, 0, 1])):
        ranking = rank_queries(detection, EvaluationConfig(nms_iou=nms_iou))
        assert ranking.num_objects.tolist() == [len(expected), 4]
        assert ranking.queries[0, : len(expected)].tolist() == expected
        assert ranking.queries[1].tolist() == [3, 1, 2, 0]
        scores = detection.pred_objectness.sigmoid()
        assert torch.equal(ranking.scores, scores.gather(1, ranking.queries))


@pytest.mark.parametrize("nms_iou", [None, 0.5])
def test_a_query_that_is_not_finite_is_no_object(nms_iou: float | None) -> None:
    """Query 1 has no score and 2 no box; of the rest 3 is better than 0. Image 1 has nothing else."""
    nan = float("nan")
    boxes = [[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 2.0, 2.0], [nan, 4.0, 2.0, 2.0], [5.0, 5.0, 4.0, 4.0]]
    detection = detected([boxes, boxes], [[0.0, nan, 4.0, 1.0], [nan, nan, nan, nan]])
    ranking = rank_queries(detection, EvaluationConfig(nms_iou=nms_iou))
    assert ranking.queries.tolist() == [[3, 0, 1, 2], [0, 1, 2, 3]]
    assert ranking.num_objects.tolist() == [2, 0] and ranking.num_broken.tolist() == [2, 4]
    assert ranking.scores.tolist()[1] == [-1] * 4 and ranking.boxes.isfinite().all()


def test_weights_that_diverge_are_evaluated(
    tiny_model: JointModel, tiny_examples: dict[str, Example], caplog: pytest.LogCaptureFixture
) -> None:
    """Weights become NaN in the last step before an evaluation; the guard rolls back in the step after it."""
    model = deepcopy(tiny_model).eval()
    for parameter in model.parameters():
        parameter.detach().fill_(float("nan"))
    batch = collator("standard")([tiny_examples[name] for name in ("two", "text", "one")])
    predictions = model.eval_forward(batch).predictions
    assert not any(prediction.objects for prediction in predictions)
    two, _, one = [sample.id for sample in batch["samples"]]
    assert f"{2 * NUM_QUERIES} of {2 * NUM_QUERIES} boxes of {two}, {one} are left out" in caplog.text
    scores = all_scores(predictions, batch["samples"], NUM_QUERIES, 0.5, MeteorLite(), with_answers=True)
    assert scores["box_ap"] == 0 and scores["recall"] == 0


def test_of_equal_scores_nms_keeps_the_first() -> None:
    detection = detected([[[1.0, 1.0, 3.0, 3.0]] * 3], [[0.5, 0.5, 0.5]])
    ranking = rank_queries(detection, EvaluationConfig(nms_iou=0.5))
    assert ranking.num_objects.tolist() == [1] and ranking.queries[0, 0] == 0


def test_what_nms_removes_is_no_object_and_changes_no_other(
    tiny_model: JointModel, tiny_examples: dict[str, Example]
) -> None:
    """With captions written for the best two only, the third best moves up where the second is a double."""
    examples = [tiny_examples[name] for name in ("two", "text", "one", "empty")]
    evaluation = replace(tiny_model.evaluation, answers=None)
    everything = predict(tiny_model, examples, "packed", evaluation)
    boxes = torch.tensor([item.box for item in everything[0].objects])
    nms_iou = float(box_iou(boxes, boxes).triu(diagonal=1).max()) - 1e-3  # so that it removes at least one
    pruned = predict(tiny_model, examples, "packed", replace(evaluation, nms_iou=nms_iou, max_captions=2))
    removed = 0
    for before, after in zip(everything, pruned, strict=True):
        removed += len(before.objects) - len(after.objects)
        kept = {item.box: item for item in before.objects}
        for place, item in enumerate(after.objects):
            expected = kept[item.box]
            assert item.score == expected.score
            assert item.caption == (expected.caption if place < 2 else "")
    assert 0 < removed < 3 * (NUM_QUERIES - 1)
    unpruned = predict(tiny_model, examples, "packed", replace(evaluation, nms_iou=1.0))
    assert unpruned == everything


def test_calibration_at_prediction(tiny_model: JointModel, tiny_examples: dict[str, Example]) -> None:
    """Boxes and captions stay, scores are the sigmoid of what the yaml says."""
    examples = [tiny_examples["two"], tiny_examples["one"]]
    evaluation = replace(tiny_model.evaluation, answers=None)
    plain = predict(tiny_model, examples, "standard", evaluation)
    found = predict(tiny_model, examples, "standard", replace(evaluation, score_scale=0.5, score_shift=1.0))
    for before, after in zip(plain, found, strict=True):
        kept = [[(item.box, item.caption) for item in prediction.objects] for prediction in (before, after)]
        assert kept[0] == kept[1]
        scores = torch.tensor([item.score for item in before.objects], dtype=torch.float64)
        expected = (0.5 * scores.logit() + 1).sigmoid().tolist()
        assert [item.score for item in after.objects] == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_metrics_see_the_captions_of_all_objects(
    tiny_model: JointModel, tiny_examples: dict[str, Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Average precision ranks what lies under the score threshold of predictions too."""
    batch = collator("standard")([tiny_examples["two"], tiny_examples["crowded"]])
    found = []
    for score_threshold in (0.0, 0.99):
        evaluation = replace(tiny_model.evaluation, score_threshold=score_threshold, answers=None)
        monkeypatch.setattr(tiny_model, "evaluation", evaluation)
        found.append(tiny_model.eval_forward(batch).predictions)
    assert found[0] == found[1]
    objects = [item for prediction in found[1] for item in prediction.objects]
    assert len(objects) == 2 * NUM_QUERIES and max(item.score for item in objects) < 0.99
    assert any(item.caption for item in objects)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["standard", "packed"])
def test_some_are_answered_as_if_all_were(
    tiny_model: JointModel, tiny_examples: dict[str, Example], layout: str
) -> None:
    """Several have teachers, whose images come before their own."""
    batch = collator(layout)(list(tiny_examples.values()))
    decoding = Decoding(tiny_model.tokenizer, tiny_model.evaluation, tiny_model.prompt)
    network = tiny_model.eval().model
    everything = decode.predict(network, batch, decoding)[1]
    names = [sample.id for sample in batch["samples"] if sample.has_image]
    assert len(names) > 3
    assert len({found.answer for found in everything}) > 2
    for chosen in ([], names[:1], names[1::2], names[-2:], names):
        some = replace(decoding, is_answered=lambda sample, chosen=chosen: sample.id in chosen)
        for found, expected in zip(decode.predict(network, batch, some)[1], everything, strict=True):
            is_chosen = found.id.partition("#")[0] in chosen  # of several images: ID#1, ID#2
            assert found.objects == expected.objects
            assert found.answer == (expected.answer if is_chosen else None)
            assert found.answer_objects == (expected.answer_objects if is_chosen else None)


@torch.no_grad()
def test_an_evaluation_writes_captions_that_are_read(
    tiny_model: JointModel, tiny_examples: dict[str, Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every score but those by category has the same bits; what is drawn of an image has captions."""
    names = ["two", "crowded", "one", "text", "empty", "unannotated"]
    batch = collator("standard")([tiny_examples[name] for name in names])
    boxes = [target["boxes"] for target in batch["targets"] if target is not None and len(target["boxes"])]
    first = tiny_model.eval().eval_forward(batch).predictions[-1].objects
    level = first[len(first) // 2].score
    monkeypatch.setattr(tiny_model, "evaluation", replace(tiny_model.evaluation, score_threshold=level, answers=None))
    plain = decode.rank_queries

    def near_truths(detection: DetectionOutputs, evaluation: EvaluationConfig) -> decode.Ranking:
        """An untrained head finds nothing: let its best objects lie on truths."""
        ranking = plain(detection, evaluation)
        rows = [row for row, target in enumerate(batch["targets"]) if target is not None and len(target["boxes"])]
        for row, truths in zip(rows, boxes, strict=True):
            count = min(len(truths), NUM_QUERIES - 1)
            ranking.boxes[row, 1 : count + 1] = truths[:count].to(ranking.boxes)
        return ranking

    monkeypatch.setattr(decode, "rank_queries", near_truths)
    found = {}
    for with_categories in (True, False):
        monkeypatch.setattr(tiny_model.scope, "with_categories", with_categories)
        found[with_categories] = tiny_model.eval().eval_forward(batch).predictions
    scored = [
        all_scores(predictions, batch["samples"], NUM_QUERIES, level, MeteorLite(), with_answers=False)
        for predictions in found.values()
    ]
    assert scored[0] == scored[1] and scored[0]["densecap_map_boxes"] > 0
    written = {
        name: sum(bool(item.caption) for prediction in predictions for item in prediction.objects)
        for name, predictions in found.items()
    }
    assert 0 < written[False] < written[True]
    for cheap, whole in zip(found[False], found[True], strict=True):
        for item, other in zip(cheap.objects, whole.objects, strict=True):
            assert item in (other, replace(other, caption=""))
    monkeypatch.setattr(tiny_model.scope, "drawn", [batch["samples"][-1].id])  # not annotated
    drawn = tiny_model.eval_forward(batch).predictions[-1]
    expected = [item.caption if item.score >= level else "" for item in found[True][-1].objects]
    assert [item.caption for item in drawn.objects] == expected and any(expected)
    assert not any(item.caption for item in found[False][-1].objects)


def test_a_prediction_has_captions_from_the_threshold_on(
    tiny_model: JointModel, tiny_examples: dict[str, Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`predict.py` knows no truth: what an evaluation leaves out does not concern it."""
    monkeypatch.setattr(tiny_model.scope, "with_categories", False)
    evaluation = replace(tiny_model.evaluation, score_threshold=0.0, answers=None)
    (found,) = predict(tiny_model, [tiny_examples["empty"]], "standard", evaluation)
    assert sum(bool(item.caption) for item in found.objects) > 1
