"""Two runs and a resumed run compute the same bits on one machine: see `fixed_run.py`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.entries.fixed_run import ADAPTED, STEPS, compare, flatten, make_inputs, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that holds the inputs of all runs."""
    path = tmp_path_factory.mktemp("fixed_run")
    make_inputs(path)
    return path


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[str, Any]:
    """Return what a run computed that was never stopped."""
    return train(folder, "uninterrupted")


@pytest.mark.slow
def test_run_takes_every_path(uninterrupted: dict[str, Any]):
    """Equal runs show little if an evaluation found nothing or a loss term was never there."""
    values: dict[str, list[float]] = {}
    for line in uninterrupted["metrics"]:
        for name in line.keys() - {"step", "in_batch"}:
            values.setdefault(name, []).extend(line[name])
    for term in ("bbox", "giou", "objectness", "caption", "lm_student", "lm_teacher", "bbox_dn", "bbox_aux"):
        losses = values[f"loss/train/loss_{term}"]
        assert len(losses) == STEPS and len(set(losses)) > STEPS // 2, term
    for name in ("box_ap", "ece", "recall", "caption_meteor_lite2", "caption_cider_d", "text_miou", "loss_caption"):
        scores = values[f"metrics/eval/{name}"]
        assert len(scores) == 2 and max(scores) > 0, name
    assert values["gradient_norm/vision"][:35] == [0.0] * 35 and min(values["gradient_norm/vision"][35:]) > 0
    assert max(values["time/epoch"]) > 1 and {"loss/share/bbox", "loss_gradient/bbox", "weight_norm/llm"} <= set(values)
    assert any("exp_avg" in name for name in uninterrupted["optimizer"])


@pytest.mark.slow
def test_second_run_is_bit_equal(folder: Path, uninterrupted: dict[str, Any]):
    assert compare(uninterrupted, train(folder, "second")) == []


@pytest.mark.slow
def test_resumed_run_is_bit_equal(folder: Path, uninterrupted: dict[str, Any]):
    assert compare(uninterrupted, train(folder, "resumed", resume_at=20)) == []


@pytest.mark.drill
def test_resumed_run_with_adapters_is_bit_equal(folder: Path):
    """Packs, stages, averages of the head, dropout; stopped by SIGTERM inside the stage in which one part is frozen."""
    whole = train(folder, "adapted", changes=ADAPTED)
    assert compare(whole, train(folder, "adapted_resumed", resume_at=20, changes=ADAPTED)) == []
    names = {name for line in whole["metrics"] for name in line}
    assert {"gradient_norm/lora_llm", "weight_norm/lora_vision", "lr/lora_llm"} <= names and "lr/llm" not in names


def test_compare_names_one_changed_bit():
    def computed(weight: torch.Tensor, loss: float) -> dict[str, Any]:
        return {
            "metrics": [{"step": 3, "in_batch": True, "loss": [loss]}],
            "weights": dict(flatten({"head": weight})),
            "optimizer": dict(flatten({"state": [{"step": 7}]})),
        }

    weight = torch.ones(2, 3)
    first, changed = computed(weight, 0.1), weight.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(2.0))
    assert compare(first, computed(weight.clone(), 0.1)) == []
    assert [line.split(":")[0] for line in compare(first, computed(changed, 0.1 + 2e-17))] == [
        "step 3 in batch, loss",
        "weights head",
    ]
    assert [line.split(":")[0] for line in compare(first, computed(weight.bfloat16(), 0.1))] == ["weights head"]
    assert [line.split(":")[0] for line in compare(first, {**first, "optimizer": {}})] == ["optimizer state/0/step"]
