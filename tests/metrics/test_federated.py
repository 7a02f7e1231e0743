"""Scores of images that were not searched for everything: LVIS's federated rule."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from faster_coco_eval import COCO, COCOeval_faster
from metric_cases import make_prediction, make_sample

from recipe.metrics.boxes import answer_boxes, box_average_precision, category_average_precision
from recipe.metrics.calibration import detections_of
from recipe.metrics.captions import dense_captioning
from recipe.metrics.categories import report_categories
from recipe.metrics.gather import FALSE, IGNORED, found_truths, is_unsure, sample_key
from recipe.metrics.scorers import MeteorLite
from recipe.schema import DetectedObject, Object, Prediction, Sample, Searched

LEFT, RIGHT, FAR, LOW = (
    (0.0, 0.0, 10.0, 10.0),
    (50.0, 0.0, 60.0, 10.0),
    (80.0, 80.0, 90.0, 90.0),
    (0.0, 80.0, 9.0, 90.0),
)
PLAIN = make_sample("a", [(LEFT, "cat"), (RIGHT, "cup")])
SEARCHED = replace(PLAIN, searched=Searched(absent=("dog",), incomplete=("cup",)))
# A second cup, a bird (not searched for), a dog (known to be absent), a second cat, then the objects.
WRONG = {"cup": (FAR, 0.9, "cup"), "bird": (FAR, 0.9, "bird"), "dog": (FAR, 0.9, "dog"), "cat": (FAR, 0.9, " Cat")}
RIGHT_ONES = [(LEFT, 0.5, "cat"), (RIGHT, 0.4, "cup")]


@pytest.mark.parametrize("name", WRONG)
def test_only_what_was_searched_for_in_full_is_false(name: str) -> None:
    is_false = name in ("dog", "cat")
    prediction = make_prediction("a", [WRONG[name], *RIGHT_ONES])
    assert is_unsure(prediction.objects, SEARCHED).tolist() == [not is_false, False, True]
    assert not is_unsure(prediction.objects, PLAIN).any()
    expected = [FALSE if is_false else IGNORED, 0, 1]
    assert (
        found_truths(prediction.objects, SEARCHED.objects or (), 0.5, is_unsure(prediction.objects, SEARCHED))
        == expected
    )
    # One false detection before both right ones: precision 1/2, then 2/3, of which COCO takes the best to the right.
    assert box_average_precision([prediction], [SEARCHED])["box_ap50"] == pytest.approx(2 / 3 if is_false else 1.0)
    assert box_average_precision([prediction], [PLAIN])["box_ap50"] == pytest.approx(2 / 3)
    found = detections_of([prediction], [SEARCHED])
    assert (len(found.scores), int(found.is_true.sum()), found.num_truths) == (3 if is_false else 2, 2, 2)
    boxes = dense_captioning([prediction], [SEARCHED], MeteorLite())["densecap_map_boxes"]
    assert (boxes == 1.0) == (not is_false)
    confusion = report_categories([prediction], [SEARCHED], 0.0).confusion
    assert sum(confusion.values()) == (3 if is_false else 2)
    answered = replace(prediction, answer="[...]", answer_objects=tuple(prediction.objects))
    assert answer_boxes([answered], [SEARCHED])["text_f1"] == pytest.approx(4 / 5 if is_false else 1.0)


def test_categories_follow_the_rule_by_hand() -> None:
    """A false cat: 1/2 for cats; the second cup is ignored, the dog has no truth to be scored by."""
    prediction = make_prediction("a", [*WRONG.values(), *RIGHT_ONES])
    assert category_average_precision([prediction], [SEARCHED])["category_ap50"] == pytest.approx((1 / 2 + 1) / 2)
    assert category_average_precision([prediction], [PLAIN])["category_ap50"] == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_a_box_finds_an_object_whatever_its_caption() -> None:
    prediction = make_prediction("a", [(LEFT, 0.9, "a bird"), (RIGHT, 0.8, "")])
    assert box_average_precision([prediction], [SEARCHED])["box_ap"] == pytest.approx(1.0)


def test_an_image_that_was_searched_for_nothing_else_scores_its_objects_alone() -> None:
    """No negative category, all positives incomplete: nothing can be false, so precision says nothing."""
    sample = replace(PLAIN, searched=Searched(incomplete=("cat", "cup")))
    prediction = make_prediction("a", [*WRONG.values(), *RIGHT_ONES])
    assert box_average_precision([prediction], [sample])["box_ap"] == pytest.approx(1.0)
    empty = Sample("a", b"", 100, 100, (), searched=Searched(absent=("dog",)))
    assert box_average_precision([prediction], [empty])["box_ap"] == -1.0


def random_case(seed: int) -> tuple[list[Prediction], list[Sample], list[str]]:
    draw, names = random.Random(seed), [f"kind {number}" for number in range(8)]
    predictions, samples = [], []
    for number in range(30):
        boxes = [
            (x, y, x + draw.randint(5, 40), y + draw.randint(5, 40))
            for x, y in zip(range(0, 60, 6), range(0, 60, 6), strict=True)
        ]
        objects = tuple(Object(box, draw.choice(names[:4])) for box in draw.sample(boxes, 4))
        held = {item.caption for item in objects}
        absent = tuple(name for name in names if name not in held and draw.random() < 0.4)
        incomplete = tuple(name for name in sorted(held) if draw.random() < 0.4)
        found = [
            DetectedObject((box[0] + draw.randint(0, 3), *box[1:]), draw.random(), draw.choice(names))
            for box in boxes
            for _ in range(3)
        ]
        samples.append(Sample(str(number), b"", 100, 100, objects, searched=Searched(absent, incomplete)))
        predictions.append(Prediction(str(number), 100, 100, tuple(found)))
    return predictions, samples, names


@pytest.mark.parametrize("seed", range(3))
def test_categories_equal_the_reference_that_drops_detections(seed: int) -> None:
    """LVIS drops what was not searched for, we ignore it: the same numbers, measured to 1e-15."""
    predictions, samples, names = random_case(seed)
    numbers = {name: number for number, name in enumerate(names, start=1)}
    truths, found, images = [], [], []
    for image, (prediction, sample) in enumerate(zip(predictions, samples, strict=True)):
        assert sample.searched is not None
        ids = {"neg_category_ids": sample.searched.absent, "not_exhaustive_category_ids": sample.searched.incomplete}
        images.append({"id": image, **{key: [numbers[name] for name in value] for key, value in ids.items()}})
        for rows, items in ((truths, sample.objects or ()), (found, prediction.objects)):
            for item in items:
                x1, y1, x2, y2 = item.box
                row = {"id": len(rows) + 1, "image_id": image, "category_id": numbers[item.caption], "iscrowd": 0}
                row |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                rows.append(row | ({"score": item.score} if isinstance(item, DetectedObject) else {}))
    categories = [{"id": number, "name": name, "frequency": "f"} for name, number in numbers.items()]
    truth = COCO({"images": images, "annotations": truths, "categories": categories})
    reference = COCOeval_faster(truth, truth.loadRes(found), "bbox", lvis_style=True, print_function=lambda *_: None)
    reference.params.maxDets = [100]
    reference.evaluate()
    reference.accumulate()
    precision = reference.eval["precision"][..., 0, 0]
    expected = float(precision[precision > -1].mean())
    scores = category_average_precision(predictions, samples)
    assert 0.05 < expected < 0.95
    assert scores["category_ap"] == pytest.approx(expected, abs=1e-12)
    plain = category_average_precision(predictions, [replace(sample, searched=None) for sample in samples])
    assert plain["category_ap"] < scores["category_ap"] - 0.01


def test_it_is_stored_with_the_objects_and_old_rows_still_load() -> None:
    row = json.loads(json.dumps({**SEARCHED.to_mds(), "image": ""}))
    assert row["objects"].keys() == {"objects", "absent", "incomplete"}
    assert Sample.from_mds({**row, "image": b""}) == SEARCHED
    old = json.loads(json.dumps({**PLAIN.to_mds(), "image": ""}))
    assert isinstance(old["objects"], list)
    assert Sample.from_mds({**old, "image": b""}) == PLAIN
    assert sample_key(SEARCHED) != sample_key(PLAIN)


def test_plain_sets_have_the_scores_of_the_rule_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all was searched for, COCO's own evaluation gives what LVIS's does: also with crowds, areas and ties."""
    draw = random.Random(3)

    def box() -> tuple[float, float, float, float]:
        x, y = draw.uniform(0, 70), draw.uniform(0, 70)
        return (x, y, x + draw.uniform(2, 30), y + draw.uniform(2, 30))

    samples, predictions = list[Sample](), list[Prediction]()
    for number in range(30):
        truths = [(box(), draw.choice(["cat", "cup", "dog"])) for _ in range(draw.randrange(5))]
        samples.append(make_sample(str(number), truths, crowds=[box()] if number % 4 == 0 else []))
        near: list[Any] = [
            (tuple(value + draw.uniform(-2, 2) for value in own), draw.choice([0.5, 0.7]), name) for own, name in truths
        ]
        predictions.append(make_prediction(str(number), [*near, *((box(), draw.random(), "cup") for _ in range(6))]))

    def scores() -> list[dict[str, float]]:
        return [function(predictions, samples) for function in (box_average_precision, category_average_precision)]

    plain = scores()
    styles = list[bool]()

    def with_rule(*arguments: Any, lvis_style: bool, **keywords: Any) -> COCOeval_faster:
        styles.append(lvis_style)
        return COCOeval_faster(*arguments, lvis_style=True, **keywords)

    monkeypatch.setattr("recipe.metrics.boxes.COCOeval_faster", with_rule)
    assert scores() == plain
    assert styles == [False, False]
    assert 0.2 < plain[0]["box_ap50"] < 0.9
