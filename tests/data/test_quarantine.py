"""A sample whose batches come out bad is left out of its packs, from the next epoch on; a resumed run agrees."""

import logging
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.models import ComposerModel

from recipe.algorithms.nan_rollback import NaNRollback
from recipe.callbacks.training_data import TrainingData
from recipe.config import LoaderConfig, NaNRollbackConfig, PackingConfig, RecipeConfig
from recipe.data.encode import Encoder
from recipe.data.loader import build_train_loader
from recipe.data.stream import PackStream
from recipe.losses.counts import split_batch
from recipe.schema import Batch

POISON = "sample-7"
NUM_SAMPLES = 12


class Poisoned(ComposerModel):
    """Its loss is NaN for one sample; notes the ids of every microbatch it is fed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[str]] = []

    def forward(self, batch: Batch) -> torch.Tensor:
        self.seen.append([sample.id for sample in batch["samples"]] if batch["num_samples"] else [])
        return self.weight.sum()

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return outputs * (float("nan") if POISON in self.seen[-1] else 1.0)


@pytest.fixture
def config(tmp_path: Path, make_sample, write_shards) -> RecipeConfig:
    stream = write_shards(tmp_path / "train", [make_sample(number) for number in range(NUM_SAMPLES)])
    return RecipeConfig(
        train_loader=LoaderConfig(
            streams={"train": stream},
            global_batch_size=2,
            collator="packed",
            dataset={"shuffle": True, "num_canonical_nodes": 1},
        ),
    )


def train(config: RecipeConfig, encoder: Encoder, folder: Path, **trainer: Any) -> tuple[Poisoned, NaNRollback]:
    """Four epochs of six batches of two microbatches of one sample."""
    model = Poisoned()
    guard = NaNRollback(NaNRollbackConfig(nan_ratio=None), 1.0, folder)
    made = Trainer(
        model=model,
        train_dataloader=build_train_loader(config.train_loader, encoder, None, config.seed, 1, split_batch),
        optimizers=torch.optim.SGD([{"params": [model.weight], "name": "all"}], lr=0.1),
        algorithms=[guard],
        callbacks=[TrainingData(None, 0, folder, num_queries=9)],
        max_duration="4ep",
        device="cpu",
        device_train_microbatch_size=1,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        **trainer,
    )
    made.fit()
    made.close()
    return model, guard


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_a_poisoned_sample_is_left_out_from_the_third_epoch(
    tmp_path: Path, config: RecipeConfig, encoder: Encoder, caplog: pytest.LogCaptureFixture, workers: dict[str, Any]
):
    """Bad in the first and the second; alone in its microbatch, so nobody else is blamed."""
    config.train_loader.dataloader = workers
    with caplog.at_level(logging.WARNING, "recipe"):
        model, guard = train(config, encoder, tmp_path)
    everyone = {f"sample-{number}" for number in range(NUM_SAMPLES)}
    starts = [0, *accumulate([NUM_SAMPLES] * 4)]
    epochs = [{name for ids in model.seen[start:end] for name in ids} for start, end in pairwise(starts)]
    assert epochs == [everyone, everyone, everyone - {POISON}, everyone - {POISON}]
    assert guard.quarantine.counts == {POISON: 2}
    assert guard.num_skipped == 2
    assert f"excluded from this epoch: {POISON}" in caplog.text


def test_a_resumed_run_leaves_it_out_too(tmp_path: Path, config: RecipeConfig, encoder: Encoder):
    """Saved after the second bad batch, in its epoch and in the next: it is dealt as it began."""
    saving = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": "1ba", "save_filename": "ba{batch}.pt"}
    whole, _ = train(config, encoder, tmp_path, **saving)
    for batch in (11, 12, 14):
        resumed, guard = train(config, encoder, tmp_path, load_path=f"{tmp_path}/checkpoints/ba{batch}.pt")
        assert resumed.seen == whole.seen[2 * batch :]
        assert guard.quarantine.active == [POISON]


def test_only_that_sample_leaves_its_pack(
    tmp_path: Path, config: RecipeConfig, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
):
    config.train_loader.packing = PackingConfig(max_tokens=600)

    def packs(quarantined: set[str]) -> list[list[str]]:
        dataset = build_train_loader(config.train_loader, encoder, None, config.seed, 1, split_batch).dataloader.dataset  # pyright: ignore
        assert isinstance(dataset, PackStream)
        dataset.quarantined = quarantined
        return [[example.sample.id for example in pack.examples] for pack in dataset]

    every, rest = packs(set()), packs({POISON})
    assert max(len(pack) for pack in every) > 1
    assert rest == [[name for name in pack if name != POISON] for pack in every]


def test_a_pack_left_empty_is_not_filled_with_a_quarantined_sample(config: RecipeConfig, encoder: Encoder):
    """The filler runs through the model too."""
    dataset = build_train_loader(config.train_loader, encoder, None, config.seed, 1, split_batch).dataloader.dataset  # pyright: ignore
    assert isinstance(dataset, PackStream)
    dataset.quarantined = {"sample-0", POISON}
    examples = [example for pack in dataset for example in pack.examples]
    assert not {example.sample.id for example in examples} & dataset.quarantined
    assert [example.sample.id for example in examples if example.is_inert] == ["sample-1"] * 2
