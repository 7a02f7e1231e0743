"""`captions_read`: without the captions of all other objects every score but those by category has the same bits."""

import random
from collections.abc import Collection
from dataclasses import replace

import pytest
from metric_cases import make_sample

from recipe.joint import all_scores
from recipe.metrics.boxes import category_average_precision
from recipe.metrics.captions import captions_read
from recipe.metrics.scorers import MeteorLite
from recipe.schema import Box, DetectedObject, Object, Prediction, Sample, Searched

THRESHOLD = 0.4
CAPTIONS = ("a red cup", "a red cup on a table", "the dog", "a dog that runs", "bird")
A: Box = (0.0, 0.0, 20.0, 20.0)
B: Box = (50.0, 50.0, 90.0, 90.0)


def scores(predictions: list[Prediction], samples: list[Sample]) -> dict[str, float]:
    return all_scores(predictions, samples, 12, THRESHOLD, MeteorLite(), with_answers=True)


def keep(prediction: Prediction, places: Collection[int]) -> Prediction:
    """The prediction as it is if only these objects are captioned."""
    rows = enumerate(prediction.objects)
    objects = tuple(item if place in places else replace(item, caption="") for place, item in rows)
    return replace(prediction, objects=objects)


def scene(seed: int) -> tuple[Prediction, Sample]:
    """Twelve objects by falling score, some of equal score, near up to six truths, which may overlap or be crowds."""
    draw = random.Random(seed)

    def box(near: Box | None = None) -> Box:
        if near is not None:
            left, top, right, bottom = (value + draw.uniform(-6, 6) for value in near)
            return left, top, max(right, left + 1), max(bottom, top + 1)
        left, top = draw.uniform(0, 60), draw.uniform(0, 60)
        return left, top, left + draw.uniform(5, 40), top + draw.uniform(5, 40)

    truths = [Object(box(), draw.choice(CAPTIONS)) for _ in range(draw.randrange(6))]
    truths += [Object(box(truth.box), draw.choice(CAPTIONS)) for truth in truths[:1]]
    truths += [Object(box(), "", iscrowd=True) for _ in range(draw.randrange(2))]
    levels = sorted((round(draw.random(), 1) for _ in range(12)), reverse=True)
    found = [
        DetectedObject(box(draw.choice(truths).box if truths and draw.random() < 0.7 else None), level, name)
        for level, name in zip(levels, draw.choices(CAPTIONS, k=12), strict=True)
    ]
    searched = {0: Searched(), 1: Searched(absent=CAPTIONS[3:4], incomplete=CAPTIONS[:1])}.get(seed % 6)
    objects = None if seed % 7 == 3 else tuple(truths)
    return Prediction(str(seed), 100, 100, tuple(found)), Sample(str(seed), b"", 100, 100, objects, searched=searched)


@pytest.mark.parametrize("start", range(0, 120, 12))
def test_every_score_has_the_same_bits(start: int) -> None:
    predictions, samples = map(list, zip(*(scene(seed) for seed in range(start, start + 12)), strict=True))
    read = [captions_read(found.objects, sample, THRESHOLD) for found, sample in zip(predictions, samples, strict=True)]
    kept = [keep(found, places) for found, places in zip(predictions, read, strict=True)]
    assert scores(kept, samples) == scores(predictions, samples)
    assert sum(map(len, read)) < 0.75 * 12 * 12  # a third of the images is not searched for everything


def test_worked_by_hand() -> None:
    """The truths A and B, and five objects."""
    sample = make_sample("a", [(A, "a red cup"), (B, "the dog")])
    objects = (
        DetectedObject((0.0, 0.0, 20.0, 19.0), 0.9, "a red cup"),  # finds A: compared with it by both
        DetectedObject((0.0, 0.0, 20.0, 20.0), 0.8, "a cup"),  # A is taken
        DetectedObject((50.0, 50.0, 90.0, 68.0), 0.7, "the bird"),  # IoU with B .45: of dense captioning alone
        DetectedObject((50.0, 50.0, 90.0, 88.0), 0.6, "a dog"),  # finds B, which another overlapped first
        DetectedObject((30.0, 0.0, 40.0, 20.0), 0.5, "a bird"),  # near nothing
    )
    assert captions_read(objects, sample, THRESHOLD) == {0, 2, 3}
    assert captions_read(objects, sample, 0.65) == {0, 2}
    whole = Prediction("a", 100, 100, objects)
    for place in (0, 2, 3):  # each is needed
        others = keep(whole, {0, 1, 2, 3, 4} - {place})
        assert scores([others], [sample]) != scores([whole], [sample])


def test_without_truths_none_is_read() -> None:
    found = (DetectedObject(A, 0.9, "a red cup"),)
    assert captions_read(found, make_sample("a", []), THRESHOLD) == set()
    assert captions_read(found, make_sample("a", None), THRESHOLD) == set()
    assert captions_read(found, Sample("a", b"", 0, 0, ()), THRESHOLD) == set()
    assert captions_read((), make_sample("a", [(A, "a red cup")]), THRESHOLD) == set()


def test_scores_by_category_read_more() -> None:
    """A second box of A is false, and a category's precision depends on which category it is of."""
    sample = make_sample("a", [(A, "a red cup")])
    objects = (DetectedObject(B, 0.9, "a red cup"), DetectedObject(A, 0.8, "a red cup"))
    whole = Prediction("a", 100, 100, objects)
    kept = keep(whole, captions_read(objects, sample, THRESHOLD))
    assert [item.caption for item in kept.objects] == ["", "a red cup"]
    found = [category_average_precision([prediction], [sample])["category_ap50"] for prediction in (whole, kept)]
    assert found == [0.5, 1.0]
