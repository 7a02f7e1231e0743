"""Two gloo processes score as one, with unequal shares."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from metric_cases import make_prediction, make_sample
from torch import distributed
from torch.multiprocessing.spawn import spawn
from torchmetrics import Metric

from recipe.metrics.answers import AnswerBoxes
from recipe.metrics.boxes import BoxAveragePrecision, CategoryAveragePrecision, ExpressionAccuracy, QueryRecall
from recipe.metrics.calibration import Calibration
from recipe.metrics.captions import CaptionCider, CaptionMatch, DenseCaptioningMAP
from recipe.metrics.scorers import MeteorLite, default_text_scorer
from recipe.schema import Box, Prediction, Sample
from tests.launch import leave

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


def metrics() -> list[Metric]:
    return [
        BoxAveragePrecision(),
        CategoryAveragePrecision(),
        CaptionMatch(0.3, MeteorLite()),
        AnswerBoxes(),
        DenseCaptioningMAP(MeteorLite()),
        CaptionCider(0.3),
        Calibration(),
        QueryRecall(4),
        ExpressionAccuracy(),
    ]


def feed(metric: Metric, pairs: list[tuple[Prediction, Sample]]) -> None:
    metric.update([prediction for prediction, _ in pairs], [sample for _, sample in pairs])


def values_of(metric: Metric) -> dict[str, float]:
    """What it computes, and of a calibration the scores of both halves."""
    values = {name: float(value) for name, value in metric.compute().items()}
    if isinstance(metric, Calibration):
        for name, half in zip("ab", metric.halves(), strict=True):
            values |= {f"{name}{row}": score for row, score in enumerate(half.scores.tolist())}
            values |= {f"{name}_images": half.num_images, f"{name}_truths": half.num_truths}
    return values


def chosen_scorers(rank: int) -> list[str]:
    """Where both ranks have Java, then where the second lacks it."""
    names = []
    for lacking in (None, 1):
        java = None if rank == lacking else "java"
        with mock.patch("shutil.which", return_value=java), mock.patch("importlib.util.find_spec"):
            names.append(default_text_scorer().name)
    return names


def scorers_of_rank(rank: int, folder: str) -> None:
    begin(rank, folder)
    Path(folder, f"{rank}.txt").write_text(" ".join(chosen_scorers(rank)))
    leave()


def begin(rank: int, folder: str) -> None:
    """Composer reads the variables too; training in the tests before leaves its own."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "NODE_RANK": 0}
    os.environ.update({name: str(value) for name, value in names.items()})
    distributed.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=2)


def one_rank(rank: int, folder: str) -> None:
    begin(rank, folder)
    pairs = scenes()
    results = []
    for metric in metrics():
        # rank 0 gets the one sample that is not annotated, so its tensors are empty at first
        for batch in [pairs[:1], pairs[7:]] if rank == 0 else [pairs[3:6], pairs[1:3], pairs[6:7]]:
            feed(metric, batch)
        results.append(values_of(metric))
        feed(metric, pairs[:1])  # after a reduction each rank goes on with its own share
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave()


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_score_as_one(tmp_path: Path):
    expected = []
    for metric in metrics():
        feed(metric, scenes())
        expected.append(values_of(metric))
    spawn(one_rank, (str(tmp_path),), nprocs=2)
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt")
    for found, wanted in zip(torch.load(tmp_path / "0.pt"), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-12)  # sums in another order: measured 2e-16
    assert 0 < expected[0]["box_ap"] < 1
    assert 0 < expected[1]["category_ap50"] < 1
    assert 0 < expected[2]["caption_match"] < 1
    assert 0 < expected[3]["text_f1"] < 1
    assert 0 < expected[4]["densecap_map_meteor_lite2"] < expected[4]["densecap_map_boxes"] < 1
    assert 0 < expected[5]["caption_cider_d"] < 10
    assert 0 < expected[6]["ece"] < 1 and 0 < expected[6]["best_f1"] < 1
    assert 0 < expected[7]["query_recall50"] < expected[7]["recall_ceiling"] <= 1
    assert 0 < expected[8]["refcoco_acc"] < 1


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_take_one_text_scorer(tmp_path: Path):
    spawn(scorers_of_rank, (str(tmp_path),), nprocs=2)
    assert {(tmp_path / f"{rank}.txt").read_text() for rank in range(2)} == {"meteor15 meteor_lite2"}


def test_batches_score_as_a_whole_and_reset_forgets():
    for metric, whole in zip(metrics(), metrics(), strict=True):
        feed(metric, scenes()[4:5])
        metric.reset()
        for pair in reversed(scenes()):
            feed(metric, [pair])
        feed(whole, scenes())
        assert values_of(metric) == pytest.approx(values_of(whole), rel=1e-12)  # sums in another order: measured 2e-16
