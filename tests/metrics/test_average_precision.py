"""`recipe.metrics.boxes`."""

import gc
import json
from pathlib import Path

import pytest
from faster_coco_eval import COCO, COCOeval_faster
from metric_cases import make_prediction, make_sample

from recipe.metrics import boxes
from recipe.metrics.boxes import box_average_precision as box_scores
from recipe.metrics.boxes import category_average_precision as category_scores
from recipe.metrics.gather import scored_pairs
from recipe.schema import DetectedObject, Object, Prediction, Sample

TIES_OF_ONE = 1.3e-4  # AR of one box an image, where equals within an image are chosen from: measured 1.2e-4
LEFT, RIGHT, FAR = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0), (80.0, 80.0, 90.0, 90.0)


def test_average_precision_worked_by_hand():
    # right, wrong, right: precision 1 up to recall 1/2 (51 of COCO's 101 recalls), then 2/3 (50 of them)
    scores = box_scores(
        [make_prediction("a", [(LEFT, 0.9, ""), (FAR, 0.8, ""), (RIGHT, 0.7, "")])],
        [make_sample("a", [(LEFT, "x"), (RIGHT, "y")])],
    )
    assert scores["box_ap50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert scores["box_ap"] == pytest.approx(scores["box_ap50"])
    assert scores["box_ap75"] == scores["box_ap50"]
    assert scores["box_ar100"] == 1.0


def test_a_box_that_is_half_right_counts_at_low_overlap_only():
    # IoU 8/10 is a hit at .50, .55, ... .80: 7 of the 10 thresholds
    scores = box_scores([make_prediction("a", [((0, 0, 8, 10), 0.9, "")])], [make_sample("a", [(LEFT, "x")])])
    assert scores["box_ap"] == pytest.approx(0.7)
    assert (scores["box_ap50"], scores["box_ap75"]) == (1.0, 1.0)


def test_a_second_box_on_the_same_object_is_wrong():
    found = [(LEFT, 0.9, ""), (LEFT, 0.8, ""), (RIGHT, 0.7, "")]
    scores = box_scores([make_prediction("a", found)], [make_sample("a", [(LEFT, "x"), (RIGHT, "y")])])
    assert scores["box_ap50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_no_prediction_scores_0_and_no_ground_truth_minus_1():
    assert box_scores([make_prediction("a", [])], [make_sample("a", [(LEFT, "x")])])["box_ap"] == 0.0
    assert set(box_scores([make_prediction("a", [(LEFT, 0.9, "")])], [make_sample("a", [])]).values()) == {-1.0}
    assert set(box_scores([], []).values()) == {-1.0}


def test_detections_on_an_empty_image_and_objects_of_an_undetected_one_count():
    right = make_prediction("a", [(LEFT, 0.5, "")]), make_sample("a", [(LEFT, "x")])
    false_alarm = make_prediction("b", [(LEFT, 0.9, "")]), make_sample("b", [])
    missed = make_prediction("c", []), make_sample("c", [(LEFT, "x")])
    assert box_scores([right[0], false_alarm[0]], [right[1], false_alarm[1]])["box_ap"] == pytest.approx(0.5)
    assert box_scores([right[0], missed[0]], [right[1], missed[1]])["box_ap"] == pytest.approx(51 / 101)


def test_not_annotated_and_text_only_samples_do_not_count():
    predictions = [make_prediction(name, [(LEFT, 0.9, "")]) for name in ("a", "b", "c")]
    samples = [
        make_sample("a", [(LEFT, "x")]),
        make_sample("b", None),
        Sample("c", b"", 0, 0, ()),
    ]
    assert box_scores(predictions, samples)["box_ap"] == 1.0


def test_boxes_in_a_crowd_are_neither_right_nor_wrong():
    found = [((20.0, 20.0, 30.0, 30.0), 0.9, ""), ((25.0, 25.0, 35.0, 35.0), 0.8, ""), (LEFT, 0.7, "")]
    with_crowd = make_sample("a", [(LEFT, "x")], crowds=[(20.0, 20.0, 70.0, 70.0)])
    assert box_scores([make_prediction("a", found)], [with_crowd])["box_ap"] == 1.0
    assert box_scores([make_prediction("a", found)], [make_sample("a", [(LEFT, "x")])])["box_ap"] < 0.5


def test_size_ranges_go_by_the_mask_area_where_given():
    box = (0.0, 0.0, 40.0, 40.0)  # 1600 pixels: medium
    found = [make_prediction("a", [(box, 0.9, "")])]
    by_box = box_scores(found, [Sample("a", b"", 100, 100, (Object(box, "x"),))])
    by_mask = box_scores(found, [Sample("a", b"", 100, 100, (Object(box, "x", area=900.0),))])
    assert (by_box["box_ap_small"], by_box["box_ap_medium"]) == (-1.0, 1.0)
    assert (by_mask["box_ap_small"], by_mask["box_ap_medium"]) == (1.0, -1.0)


def test_recall_by_the_number_of_boxes_allowed():
    # the best box is wrong, the second right; the other object is the eleventh box's
    found = [(FAR, 0.9, ""), (LEFT, 0.8, ""), *[(FAR, 0.7, "")] * 8, (RIGHT, 0.6, "")]
    scores = box_scores([make_prediction("a", found)], [make_sample("a", [(LEFT, "x"), (RIGHT, "y")])])
    assert [scores[f"box_{name}"] for name in ("ar1", "ar10", "ar100")] == [0.0, 0.5, 1.0]


def test_only_the_100_best_boxes_of_an_image_count():
    noise = [(FAR, 0.9, "")] * 100
    assert box_scores([make_prediction("a", [*noise, (LEFT, 0.1, "")])], [make_sample("a", [(LEFT, "x")])])[
        "box_ar100"
    ] == pytest.approx(0.0)


def test_categories_are_averaged_and_captions_compared_without_case():
    found = [(LEFT, 0.9, " Cat "), (RIGHT, 0.8, "bird"), (FAR, 0.7, ""), (FAR, 0.6, "unicorn")]
    truths = [(LEFT, "cat"), (RIGHT, "dog")]
    scores = category_scores([make_prediction("a", found)], [make_sample("a", truths)])
    assert (scores["category_ap"], scores["category_ap50"], scores["category_ar1"]) == (0.5, 0.5, 0.5)


def test_predictions_of_other_samples_are_refused():
    with pytest.raises(ValueError, match="do not belong"):
        box_scores([make_prediction("a", [])], [make_sample("b", [])])
    with pytest.raises(ValueError, match="1 predictions do not belong to 0 samples"):
        box_scores([make_prediction("a", [])], [])


def coco_reference(folder: Path) -> tuple[list[Prediction], list[Sample]]:
    truth = json.loads((folder / "gt_instances_val2014_100.json").read_text())
    found = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    predictions, samples = [], []
    for image in sorted(truth["images"], key=lambda image: image["id"]):  # COCO's order, which breaks ties
        name, width, height = str(image["id"]), image["width"], image["height"]
        objects = tuple(
            Object(corners(item["bbox"]), names[item["category_id"]], bool(item["iscrowd"]), item["area"])
            for item in truth["annotations"]
            if item["image_id"] == image["id"]
        )
        detections = tuple(
            DetectedObject(corners(item["bbox"]), item["score"], names[item["category_id"]])
            for item in found
            if item["image_id"] == image["id"]
        )
        samples.append(Sample(name, b"", width, height, objects))
        predictions.append(Prediction(name, width, height, detections))
    return predictions, samples


def corners(bbox: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = bbox
    return x, y, x + width, y + height


@pytest.mark.shared_data
def test_parity_with_the_published_coco_evaluation(shared_data: Path):
    # val2014_fake_eval_res.txt, section bbox; measured difference below 5e-4, which is its rounding
    predictions, samples = coco_reference(shared_data / "eval_reference")
    assert len(samples) == 100
    scores = category_scores(predictions, samples)
    published = {"ap": 0.505, "ap50": 0.697, "ap75": 0.573, "ap_small": 0.586, "ap_medium": 0.519, "ap_large": 0.501}
    published |= {"ar1": 0.387, "ar10": 0.594, "ar100": 0.595}
    assert {name: round(scores[f"category_{name}"], 3) for name in published} == published
    assert scores["category_ap"] == pytest.approx(0.5045807, abs=1e-7)  # measured: 2.4e-8


@pytest.mark.shared_data
def test_class_agnostic_parity_with_faster_coco_eval(shared_data: Path):
    folder = shared_data / "eval_reference"
    truth = COCO(str(folder / "gt_instances_val2014_100.json"))
    found = truth.loadRes(str(folder / "instances_val2014_fakebbox100_results.json"))
    reference = COCOeval_faster(truth, found, "bbox", print_function=lambda *args: None)
    reference.params.useCats = 0
    reference.run()
    scores = box_scores(*coco_reference(folder))
    order = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100"]  # of COCO's summary
    assert list(scores) == [f"box_{name}" for name in order]
    expected = dict(zip(scores, map(float, reference.stats[:9]), strict=True))
    assert scores.pop("box_ar1") == pytest.approx(expected.pop("box_ar1"), abs=TIES_OF_ONE)
    assert scores == pytest.approx(expected, abs=1e-7)  # measured: 2.5e-8


def test_cycles_are_collected_afterwards_as_before(monkeypatch: pytest.MonkeyPatch):
    searched: list[bool] = []
    monkeypatch.setattr(boxes, "scored_pairs", lambda *rows: searched.append(gc.isenabled()) or scored_pairs(*rows))
    truth, found = [Sample("a", b"x", 9, 9, ())], [Prediction("b", 9, 9, ())]
    assert gc.isenabled()
    with pytest.raises(ValueError, match="do not belong"):
        box_scores(found, truth)
    assert gc.isenabled()
    gc.disable()
    try:
        box_scores([], [])
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert searched == [False, False]
