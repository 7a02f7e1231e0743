"""`recipe.metrics.captions`: each rule of the definition by a case worked by hand."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from metric_cases import make_prediction, make_sample

from recipe.metrics.captions import _measure, assign, average_precision, dense_captioning, inclusive_iou, merge_truths
from recipe.metrics.scorers import MeteorLite
from recipe.schema import Box, DetectedObject, Object, Prediction, Sample

A, B, FAR = (0.0, 0.0, 99.0, 99.0), (200.0, 0.0, 299.0, 99.0), (500.0, 500.0, 599.0, 599.0)


class Told:
    """A text scorer for tests: the candidate is its own score, as long as there is a reference."""

    name = "told"

    def __call__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        return [float(text) if own else 0.0 for text, own in zip(candidates, references, strict=True)]


def in_frame(name: str, truths: list[tuple[Box, str]], crowds: Sequence[Box] = ()) -> Sample:
    """A sample of 720 x 720 pixels: the frame itself."""
    objects = [Object(box, caption) for box, caption in truths] + [Object(box, "", iscrowd=True) for box in crowds]
    return Sample(name, b"", 720, 720, tuple(objects))


def scores(predictions: list[Prediction], samples: list[Sample]) -> dict[str, float]:
    return dense_captioning(predictions, samples, Told())


def mean_ap(found: list[tuple[Box, float, str]], sample: Sample) -> float:
    return scores([make_prediction(sample.id, found)], [sample])["densecap_map_told"]


def iou(box: Box, other: Box) -> float:
    return inclusive_iou(np.array([box], dtype=float), np.array([other], dtype=float)).item()


def test_areas_count_the_last_pixel():
    # 10 x 10 pixels each, 5 x 10 shared
    assert iou((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert iou((3, 3, 3, 3), (3, 3, 3, 3)) == 1.0
    assert iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0.0


def overlap_of(prediction: Prediction, sample: Sample) -> float:
    assert sample.objects is not None
    rows, _ = _measure(prediction, sample, sample.objects, Told())
    return float(rows[0, 1])


def test_boxes_are_compared_in_the_frame_of_720_pixels():
    # Of 7200 x 3600 pixels: in the frame 10 x 11 pixels are shared of twice 11 x 11. In the image's own pixels it
    # would be 91 * 101 / (2 * 101 * 101 - 91 * 101) = .82.
    sample = Sample("a", b"", 7200, 3600, (Object((0.0, 0.0, 100.0, 100.0), "x"),))
    found = DetectedObject((10.0, 0.0, 110.0, 100.0), 0.9, "1")
    assert overlap_of(Prediction("a", 7200, 3600, (found,)), sample) == pytest.approx(110 / 132)


@pytest.mark.parametrize(
    ("width", "height", "truth", "found", "expected"),
    [
        (3600, 7200, (0.0, 0.0, 100.0, 100.0), (10.0, 0.0, 110.0, 100.0), 110 / 132),  # as above
        (72, 36, (0.0, 0.0, 10.0, 10.0), (1.0, 0.0, 11.0, 10.0), 91 / 111),  # 91 of twice 101 columns shared
    ],
)
def test_the_frame_is_of_the_longer_side_and_enlarges(width: int, height: int, truth: Box, found: Box, expected: float):
    sample = Sample("a", b"", width, height, (Object(truth, "x"),))
    prediction = Prediction("a", width, height, (DetectedObject(found, 0.9, "1"),))
    assert overlap_of(prediction, sample) == pytest.approx(expected)


def merged(boxes: list[Box]) -> list[tuple[list[float], list[str]]]:
    truths = [Object(box, str(index)) for index, box in enumerate(boxes)]
    means, captions = merge_truths(truths, 1.0)
    return list(zip(means.tolist(), captions, strict=True))


def test_truths_merge_from_an_iou_of_70_percent():
    # 100 x 100 against 70 x 100 inside it is exactly .7; one pixel less is under
    assert len(merged([A, (0, 0, 69, 99)])) == 1
    assert len(merged([A, (0, 0, 68, 99)])) == 2


def num_merged(size: int, boxes: list[Box]) -> int:
    objects = tuple(Object(box, "x") for box in boxes)
    return _measure(Prediction("a", size, size, ()), Sample("a", b"", size, size, objects), objects, Told())[1]


def test_truths_merge_by_their_overlap_in_the_frame():
    # In an image of 72 pixels 7 of 10 columns are .7; in the frame 61 of 91 are .67.
    assert num_merged(72, [(0, 0, 9, 9), (0, 0, 6, 9)]) == 2
    # In an image of 7200 pixels 69 of 100 columns are .69; in the frame 7.8 of 10.9 are .72.
    assert num_merged(7200, [(0, 0, 99, 99), (0, 0, 68, 99)]) == 1


def test_a_merged_truth_is_the_mean_box_with_all_captions():
    assert merged([(0, 0, 99, 99), B, (0, 7, 99, 99), (0, 20, 99, 99)]) == [
        ([0, 9, 99, 99], ["0", "2", "3"]),
        (list(B), ["1"]),
    ]


def test_the_largest_cluster_merges_first():
    # In a chain of five, neighbours overlap by .7 or more (100 x 100, 15 pixels apart: 85 / 115 = .74), others do
    # not (70 / 130). The first of the threes is 0-1-2; then of 3-4 the pair is left.
    chain: list[Box] = [(15.0 * step, 0.0, 15.0 * step + 99, 99.0) for step in range(5)]
    assert [texts for _, texts in merged(chain)] == [["0", "1", "2"], ["3", "4"]]
    # Reached from a pair first, 1-2 would be lost to the pair; the three of 2 is larger.
    assert [texts for _, texts in merged([chain[0], chain[2], chain[1], FAR])] == [["0", "1", "2"], ["3"]]


def test_merging_is_not_transitive():
    # 0 and 2 overlap 1 but not each other; the cluster is that of 1, of which 0 and 2 are members; 3 overlaps only 2
    chain: list[Box] = [(15.0 * step, 0.0, 15.0 * step + 99, 99.0) for step in range(4)]
    assert [texts for _, texts in merged(chain)] == [["0", "1", "2"], ["3"]]


def test_a_detection_goes_to_the_truth_that_it_overlaps_most():
    overlap, truth, is_first = assign(np.array([[0.25, 0.5], [0.5, 0.75], [0.0, 0.0], [0.25, 0.25]]))
    assert truth.tolist() == [1, 1, -1, 0]
    assert overlap.tolist() == [0.5, 0.75, 0.0, 0.25]
    assert is_first.tolist() == [True, False, False, True]


def test_the_first_detection_takes_its_truth_even_if_it_then_fails():
    truth = in_frame("a", [(A, "x")])
    right, wrong = (A, 0.8, "1"), (A, 0.9, "0")
    assert mean_ap([right], truth) == 1.0
    assert mean_ap([wrong, right], truth) == 0.0
    far_off = ((50.0, 0.0, 149.0, 99.0), 0.9, "1")  # IoU 1/3: true at .3 only, and it has taken the truth at all
    assert mean_ap([far_off, right], truth) == pytest.approx(1 / 5)
    # of five cells, not the best one, also without regard to text
    assert scores([make_prediction("a", [far_off])], [truth])["densecap_map_boxes"] == pytest.approx(1 / 5)


def test_detections_need_not_be_sorted():
    truth = in_frame("a", [(A, "x")])
    assert mean_ap([(A, 0.8, "0"), (A, 0.9, "1")], truth) == 1.0
    assert mean_ap([(A, 0.8, "1"), (A, 0.9, "0")], truth) == 0.0


def test_a_second_detection_is_wrong_also_without_regard_to_text():
    twice = make_prediction("a", [(A, 0.9, "1"), (A, 0.8, "1")])
    result = scores([twice], [in_frame("a", [(A, "x"), (B, "y")])])
    assert result == pytest.approx({"densecap_map_told": 51 / 100, "densecap_map_boxes": 51 / 100})


def test_a_detection_that_overlaps_nothing_takes_nothing():
    assert mean_ap([(FAR, 0.9, "1"), (A, 0.8, "1")], in_frame("a", [(A, "x")])) == pytest.approx(1 / 2)


@pytest.mark.parametrize(("width", "share"), [(30, 1), (29, 0), (49, 2), (50, 3), (70, 5), (100, 5)])
def test_a_threshold_of_overlap_includes_its_value(width: int, share: int):
    found = (0.0, 0.0, width - 1.0, 99.0)
    assert mean_ap([(found, 0.9, "1")], in_frame("a", [(A, "x")])) == pytest.approx(share / 5)


@pytest.mark.parametrize(
    ("text", "share"), [("0", 0), ("0.001", 1), ("0.05", 1), ("0.1", 2), ("0.2", 4), ("0.25", 5), ("0.2501", 6)]
)
def test_a_text_must_score_above_its_threshold(text: str, share: int):
    result = scores([make_prediction("a", [(A, 0.9, text)])], [in_frame("a", [(A, "x")])])
    assert result == pytest.approx({"densecap_map_told": share / 6, "densecap_map_boxes": 1.0})


def test_average_precision_worked_by_hand():
    # right, wrong, right of three: precision 1 up to recall 1/3 (t = 0 to .33), 2/3 up to 2/3 (.34 to .66), then 0
    assert average_precision(torch.tensor([True, False, True]), 3) == pytest.approx((34 + 33 * 2 / 3) / 100)
    # a later better precision counts for earlier recalls: wrong, right, right: 2/3 for all of t = 0 to .99
    assert average_precision(torch.tensor([False, True, True]), 2) == pytest.approx(2 / 3)
    assert average_precision(torch.tensor([False]), 2) == 0.0
    assert average_precision(torch.tensor([], dtype=torch.bool), 2) == 0.0


def test_recall_counts_merged_truths():
    near: Box = (0.0, 0.0, 99.0, 89.0)
    assert mean_ap([(A, 0.9, "1")], in_frame("a", [(A, "x"), (near, "y")])) == 1.0
    assert mean_ap([(A, 0.9, "1")], in_frame("a", [(A, "x"), (B, "y")])) == pytest.approx(51 / 100)


def test_detections_are_sorted_over_all_images():
    right, wrong = make_prediction("a", [(A, 0.5, "1")]), make_prediction("b", [(FAR, 0.9, "1")])
    samples = [in_frame("a", [(A, "x")]), in_frame("b", [])]
    assert scores([right, wrong], samples)["densecap_map_told"] == pytest.approx(1 / 2)
    wrong = make_prediction("b", [(FAR, 0.4, "1")])
    assert scores([right, wrong], samples)["densecap_map_told"] == 1.0


def test_the_truth_as_prediction_scores_1():
    truths = [(A, "a red cup"), ((0.0, 0.0, 99.0, 89.0), "the cup on the table"), (B, "dog"), (FAR, "a dog runs")]
    samples = [in_frame("a", truths), in_frame("b", truths[2:]), in_frame("c", [])]
    found = [[(box, 0.9, caption) for box, caption in truths[:1] + truths[2:]], [(*truths[2][:1], 0.8, "dog")]]
    found[1].append((FAR, 0.7, "a dog runs"))
    predictions = [make_prediction(name, own) for name, own in zip("abc", [*found, []], strict=True)]
    assert dense_captioning(predictions, samples, MeteorLite()) == {
        "densecap_map_meteor_lite2": 1.0,
        "densecap_map_boxes": 1.0,
    }


def test_every_reference_of_a_merged_truth_is_asked():
    asked: list[tuple[list[str], list[list[str]]]] = []

    class Spy(Told):
        def __call__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
            asked.append((list(candidates), [list(own) for own in references]))
            return super().__call__(candidates, references)

    truths = [(A, "x"), ((0.0, 0.0, 99.0, 89.0), "y"), (B, "z")]
    # not asked: what overlaps too little, what comes second, what overlaps nothing
    found = [(A, 0.9, "1"), (A, 0.8, "0.5"), ((200.0, 0.0, 209.0, 99.0), 0.7, "0.2"), (FAR, 0.6, "0.1")]
    dense_captioning([make_prediction("a", found)], [in_frame("a", truths)], Spy())
    assert asked == [(["1"], [["x", "y"]])]


def test_images_without_objects_or_detections():
    found = [(A, 0.9, "1")]
    nothing = {"densecap_map_told": -1.0, "densecap_map_boxes": -1.0}
    assert scores([make_prediction("a", found)], [in_frame("a", [])]) == nothing
    assert scores([make_prediction("a", [])], [in_frame("a", [])]) == nothing
    assert scores([], []) == nothing
    assert scores([make_prediction("a", found)], [make_sample("a", None)]) == nothing
    missed = scores([make_prediction("a", [])], [in_frame("a", [(A, "x")])])
    assert missed == {"densecap_map_told": 0.0, "densecap_map_boxes": 0.0}
    assert all(math.isfinite(value) for value in missed.values())


def test_what_lies_in_a_crowd_is_ignored():
    crowd: Box = (400.0, 400.0, 699.0, 699.0)
    found = [(FAR, 0.9, "1"), (A, 0.8, "1")]
    assert mean_ap(found, in_frame("a", [(A, "x")], [crowd])) == 1.0
    assert mean_ap(found, in_frame("a", [(A, "x")])) == pytest.approx(1 / 2)
    # 40 of 100 columns lie in the crowd: ignored at .3 and .4, wrong at .5, .6 and .7
    assert mean_ap(found, in_frame("a", [(A, "x")], [(560.0, 400.0, 699.0, 699.0)])) == pytest.approx(
        (1 + 1 + 3 / 2) / 5
    )


def test_what_finds_a_truth_in_a_crowd_counts():
    crowd: Box = (0.0, 0.0, 399.0, 399.0)
    assert mean_ap([(A, 0.9, "1"), (FAR, 0.8, "1")], in_frame("a", [(A, "x"), (FAR, "y")], [crowd])) == 1.0
    assert mean_ap([(A, 0.9, "1")], in_frame("a", [(A, "x"), (FAR, "y")], [crowd])) == pytest.approx(51 / 100)


def test_a_crowd_is_scaled_to_the_frame():
    # In an image of 1440 pixels: 1000 to 1199 is in the crowd, and would not in the frame if only it were scaled.
    objects = (Object((0.0, 0.0, 199.0, 199.0), "x"), Object((800.0, 800.0, 1399.0, 1399.0), "", iscrowd=True))
    sample = Sample("a", b"", 1440, 1440, objects)
    found = [((1000.0, 1000.0, 1199.0, 1199.0), 0.9, "1"), ((0.0, 0.0, 199.0, 199.0), 0.8, "1")]
    assert mean_ap(found, sample) == 1.0


def test_names_tell_the_scorer():
    assert list(dense_captioning([], [], Told())) == ["densecap_map_told", "densecap_map_boxes"]
    assert "densecap_map_meteor_lite2" in dense_captioning([], [], MeteorLite())
