"""Objects that no query is left for are counted in every step, as many as the matching leaves over."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from composer.core import State
from composer.devices import DeviceCPU
from composer.loggers import Logger

from recipe.callbacks import training_data
from recipe.callbacks.training_data import TrainingData, num_unmatched
from recipe.data.maker import make_inert
from recipe.joint import JointModel
from recipe.schema import Batch, Example
from tests.support.tiny_cases import NUM_QUERIES, make_batches


def unmatched_of(batches: Sequence[Batch], folder: Path, num_queries: int) -> float:
    """What is logged of a step."""
    logged: dict[str, float] = {}
    state, logger = SimpleNamespace(batch=batches, device=DeviceCPU()), SimpleNamespace(log_metrics=logged.update)
    TrainingData(None, 0, folder, num_queries).batch_start(cast(State, state), cast(Logger, logger))
    return logged["train/unmatched_objects"]


def test_by_hand(tiny_examples: dict[str, Example], tmp_path: Path):
    """Six objects in one image, two in two others: with 5 queries one is left, with 1 query 5, 1 and 1 are."""
    examples = list(tiny_examples.values())  # also without annotation, without objects, without an image
    for microbatch_size in (6, 2, 1):
        batches = make_batches(examples, "packed", microbatch_size)
        for num_queries, expected in ((100, 0), (6, 0), (5, 1), (1, 5 + 1 + 1)):
            assert unmatched_of(batches, tmp_path, num_queries) == expected


def test_what_is_dealt_to_keep_ranks_in_step_is_not_counted(tiny_examples: dict[str, Example]):
    assert num_unmatched(make_batches([make_inert(tiny_examples["crowded"])], "packed", 1), 1) == 0


def test_it_is_what_the_matching_leaves(tiny_model: JointModel, tiny_examples: dict[str, Example]):
    batches = make_batches(list(tiny_examples.values()), "standard", 2)
    objects = sum(len(target["boxes"]) for batch in batches for target in batch["targets"] if target is not None)
    with torch.no_grad():
        matched = sum(len(tiny_model(batch).matches[-1]) for batch in batches)
    assert num_unmatched(batches, NUM_QUERIES) == objects - matched == 1


def test_it_is_summed_over_ranks(tiny_examples: dict[str, Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three ranks with the same batch."""
    monkeypatch.setattr(training_data.dist, "all_reduce", lambda sums: sums.mul_(3))
    assert unmatched_of(make_batches([tiny_examples["crowded"]], "packed", 1), tmp_path, NUM_QUERIES) == 3
