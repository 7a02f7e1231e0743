"""Every entry that the model registers exists, is finite, and says which text scorer made it."""

import math
from dataclasses import replace

import pytest
import torch
from metric_cases import make_prediction, make_sample

from recipe.joint import JointModel
from recipe.metrics.gather import Evaluation
from recipe.metrics.scorers import MeteorLite
from recipe.schema import LossCounts

NAMES = {
    *(f"{kind}_{name}" for kind in ("box", "category") for name in ("ap", "ap50", "ap75", "ar1", "ar10", "ar100")),
    *(f"{kind}_ap_{size}" for kind in ("box", "category") for size in ("small", "medium", "large")),
    "densecap_map_meteor_lite2", "densecap_map_boxes", "caption_match", "caption_meteor_lite2", "caption_cider_d",
    "matched_boxes", "recall", "recall_ceiling", "query_recall50", "refcoco_acc", "refcoco_samples",
    "ece", "best_score_threshold", "best_f1", "text_f1", "text_f1_95", "text_miou", "text_parse_failure_rate",
    "text_answers",
    *Evaluation.denominators,
}  # fmt: skip
COUNTS = LossCounts(teacher_tokens=0, student_tokens=0, objects=0, images=0, microbatches=1)
LOSSES = dict.fromkeys(Evaluation.denominators, torch.tensor(0.0))
BOX, OTHER = (0.0, 0.0, 50.0, 50.0), (50.0, 50.0, 90.0, 90.0)


def test_all_entries_are_computed(tiny_model: JointModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recipe.joint.default_text_scorer", MeteorLite)
    entries = tiny_model.get_metrics(is_train=False)
    assert set(entries) == NAMES
    predictions = [make_prediction("a", [(BOX, 0.9, "a red cup")], [BOX]), make_prediction("b", [])]
    samples = [make_sample("a", [(BOX, "a red cup")], expression="the cup"), make_sample("b", [])]
    for name, entry in entries.items():
        entry.update(predictions, samples, LOSSES, COUNTS)
        value = float(entry.compute())
        assert math.isfinite(value), name
        if name.endswith(
            ("ap50", "ap", "recall50", "recall", "acc", "f1", "match", "meteor_lite2", "boxes", "ceiling")
        ):
            assert value == 1.0, name


def test_the_ceiling_is_of_the_heads_queries(tiny_model: JointModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recipe.joint.default_text_scorer", MeteorLite)
    entries = tiny_model.get_metrics(is_train=False)
    num_queries = tiny_model.model.detection_head.num_queries
    truths = [((float(index), 0.0, float(index + 1), 10.0), "a cup") for index in range(num_queries + 1)]
    for entry in entries.values():
        entry.update([make_prediction("a", [])], [make_sample("a", truths)], LOSSES, COUNTS)
    assert float(entries["recall_ceiling"].compute()) == pytest.approx(num_queries / (num_queries + 1))


@pytest.mark.parametrize(("score", "expected"), [(0.39, 0), (0.4, 1)])
def test_captions_are_judged_from_the_score_threshold_on(
    score: float, expected: int, tiny_model: JointModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("recipe.joint.default_text_scorer", MeteorLite)
    monkeypatch.setattr(tiny_model, "evaluation", replace(tiny_model.evaluation, score_threshold=0.4))
    entries = tiny_model.get_metrics(is_train=False)
    truth = make_sample("a", [(BOX, "a red cup is here"), (OTHER, "a blue cup is there")])
    for entry in entries.values():
        entry.update([make_prediction("a", [(BOX, score, "a red cup is here")])], [truth], LOSSES, COUNTS)
    assert float(entries["matched_boxes"].compute()) == expected
    assert float(entries["caption_cider_d"].compute()) == pytest.approx(10 * expected)


def test_without_answers_none_are_judged(tiny_model: JointModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recipe.joint.default_text_scorer", MeteorLite)
    monkeypatch.setattr(tiny_model, "evaluation", replace(tiny_model.evaluation, answers=None))
    names = set(tiny_model.get_metrics(is_train=False))
    assert names == {name for name in NAMES if not name.startswith("text_")}
