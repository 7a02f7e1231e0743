"""Two gloo processes score as one, with unequal shares."""

import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from composer.utils import dist
from metric_cases import make_prediction, make_sample

from recipe.joint import all_scores
from recipe.metrics.boxes import category_average_precision
from recipe.metrics.gather import Evaluation
from recipe.metrics.scorers import MeteorLite, default_text_scorer
from recipe.schema import Box, LossCounts, Prediction, Sample
from tests.launches.launch import leave, run_composer

CAPTIONS = ["a black cat", "a dog that runs", "the bird"]


def scenes() -> list[tuple[Prediction, Sample]]:
    """Seven random scenes, some without objects, predictions, annotation or an answer that parses; two expressions."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for index in range(7):
        corner = torch.rand(4, 2, generator=generator, dtype=torch.float64) * 70
        size = torch.rand(4, 2, generator=generator, dtype=torch.float64) * 20 + 10
        jitter = torch.randn(4, 4, generator=generator, dtype=torch.float64) * 2
        boxes: list[Box] = [tuple(row) for row in torch.cat([corner, corner + size], 1).tolist()]
        moved: list[Box] = [tuple(row) for row in (torch.cat([corner, corner + size], 1) + jitter).tolist()]
        scores = torch.rand(4, generator=generator, dtype=torch.float64).sort(descending=True).values.tolist()
        truths = [(box, CAPTIONS[number % 3]) for number, box in enumerate(boxes)]
        found = [(box, scores[number], CAPTIONS[number // 2]) for number, box in enumerate(moved)]
        sample = make_sample(str(index), [None, [], truths][min(index, 2)], None if index == 0 else boxes[:1])
        pairs.append((make_prediction(str(index), [] if index == 3 else found, None if index == 4 else moved), sample))
    for name, box in (("right", (10.0, 10.0, 50.0, 50.0)), ("wrong", (50.0, 50.0, 90.0, 90.0))):
        sample = make_sample(name, [((10.0, 10.0, 50.0, 50.0), CAPTIONS[0])], expression="the cat")
        pairs.append((make_prediction(name, [(box, 0.7, CAPTIONS[0])]), sample))
    return pairs


COUNTS = LossCounts(teacher_tokens=3, student_tokens=4, objects=5, images=6, microbatches=1)
scores = partial(all_scores, num_queries=4, score_threshold=0.3, scorer=MeteorLite(), with_answers=True)


def feed(metric: Evaluation, pairs: list[tuple[Prediction, Sample]]) -> None:
    losses = dict.fromkeys(Evaluation.denominators, torch.tensor(1.0))
    metric.update([prediction for prediction, _ in pairs], [sample for _, sample in pairs], losses, COUNTS)


def values_of(metric: Evaluation) -> tuple[dict[str, float], list[str]]:
    """What it computes, and the order of what it was computed from."""
    values = {name: float(value) for name, value in metric.compute().items()}
    return values, [sample.id for _, _, sample in metric.evaluated]


def chosen_scorers(rank: int) -> list[str]:
    """Where both ranks have Java, then where the second lacks it."""
    names = []
    for lacking in (None, 1):
        java = None if rank == lacking else "java"
        with mock.patch("shutil.which", return_value=java), mock.patch("importlib.util.find_spec"):
            names.append(default_text_scorer().name)
    return names


def one_rank(folder: str) -> None:
    dist.initialize_dist("cpu", timeout=60)
    rank, pairs = dist.get_global_rank(), scenes()
    metric = Evaluation(scores, category_average_precision)
    # rank 0 gets the one sample that is not annotated, so its tensors are empty at first
    for batch in [pairs[:1], pairs[7:]] if rank == 0 else [pairs[3:6], pairs[1:3], pairs[6:7]]:
        feed(metric, batch)
    first = values_of(metric)
    feed(metric, pairs[:1])  # after a reduction each rank continues with its own share
    torch.save((first, values_of(metric)), Path(folder, f"{rank}.pt"))
    Path(folder, f"{rank}.txt").write_text(" ".join(chosen_scorers(rank)))
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two ranks left what they computed."""
    folder = tmp_path_factory.mktemp("ranks")
    run_composer(2, __file__, str(folder), timeout=120)
    return folder


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_score_as_one(ranks: Path):
    metric = Evaluation(scores, category_average_precision)
    for start in range(0, 10, 2):  # five batches, as the ranks have
        feed(metric, scenes()[start : start + 2])
    expected = values_of(metric)
    assert torch.load(ranks / "0.pt") == torch.load(ranks / "1.pt")
    first, again = torch.load(ranks / "0.pt")
    assert first == expected
    assert again[1] == first[1]  # what is not annotated changes no score
    values = expected[0]
    assert 0 < values["box_ap"] < 1
    assert 0 < values["category_ap50"] < 1
    assert 0 < values["caption_match"] < 1
    assert 0 < values["text_f1"] < 1
    assert values["text_answers"] == 5  # of the eight annotated scenes three have no answer
    assert 0 < values["densecap_map_meteor_lite2"] < values["densecap_map_boxes"] < 1
    assert 0 < values["caption_cider_d"] < 10
    assert 0 < values["ece"] < 1 and 0 < values["best_f1"] < 1
    assert 0 < values["query_recall50"] < values["recall_ceiling"] <= 1
    assert 0 < values["refcoco_acc"] < 1
    assert values["loss_bbox"] == pytest.approx(5 / 25)


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_take_one_text_scorer(ranks: Path):
    assert {(ranks / f"{rank}.txt").read_text() for rank in range(2)} == {"meteor15 meteor_lite2"}


def test_batches_score_as_a_whole_and_reset_forgets():
    metric, whole = Evaluation(scores), Evaluation(scores)
    feed(metric, scenes()[4:5])
    metric.reset()
    for pair in reversed(scenes()):
        feed(metric, [pair])
    feed(whole, scenes())
    assert values_of(metric) == values_of(whole)


if __name__ == "__main__":
    one_rank(sys.argv[1])
