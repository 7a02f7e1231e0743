"""Packs through the Trainer: epochs of unequal length are trained whole, counts are logged, bad samples bounded."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel

from recipe.callbacks.training_data import TrainingData
from recipe.config import LoaderConfig, PackingConfig, RecipeConfig, TeacherConfig
from recipe.data.encode import Encoder
from recipe.data.loader import build_train_loader
from recipe.data.stream import PackStream, read_teachers
from recipe.losses.counts import split_batch
from recipe.schema import Batch

MAX_TOKENS = 400


class Counter(ComposerModel):
    """Notes what it is fed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Batch] = []

    def forward(self, batch: Batch) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight.sum()

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return outputs


@pytest.fixture
def config(tmp_path: Path, make_sample, write_shards) -> RecipeConfig:
    train = write_shards(tmp_path / "train", [make_sample(n, n % 4, 28 + 9 * n, 60) for n in range(24)])
    pool = write_shards(tmp_path / "pool", [make_sample(n, 3) for n in range(100, 104)])
    return RecipeConfig(
        seed=3,
        # How many teachers are drawn, and so how many packs there are, differs from epoch to epoch.
        teachers=TeacherConfig(stream=pool, num_teachers=2, teacher_ratio=0.3),
        train_loader=LoaderConfig(
            streams={"train": train},
            global_batch_size=2,
            collator="packed",
            packing=PackingConfig(max_tokens=700),
            dataset={"shuffle": True},
        ),
    )


def train(
    config: RecipeConfig, encoder: Encoder, folder: Path, duration: str, **changes: Any
) -> tuple[Trainer, Counter]:
    model = Counter()
    loader = config.train_loader
    spec = build_train_loader(
        config.train_loader, encoder, read_teachers(config.teachers, config.seed), config.seed, 1, split_batch
    )
    budget = loader.packing.max_tokens if loader.packing else None
    callbacks: list[Callback] = [TrainingData(budget, loader.max_bad_samples, folder, num_queries=9)]
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration=duration,
        device="cpu",
        device_train_microbatch_size=1,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        loggers=InMemoryLogger(),
        callbacks=callbacks,
        **changes,
    )
    trainer.fit()
    return trainer, model


def packs_of(trainer: Trainer) -> list[int]:
    dataset = trainer.state.train_dataloader.dataset  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    assert isinstance(dataset, PackStream)
    return [dataset.plan(epoch).num_packs for epoch in range(6)]


def logged(trainer: Trainer) -> dict[str, list[float]]:
    (logger,) = (item for item in trainer.logger.destinations if isinstance(item, InMemoryLogger))
    return {name: [float(value) for _, value in values] for name, values in logger.data.items()}


def test_epochs_of_unequal_length_are_trained_whole(tmp_path: Path, config: RecipeConfig, encoder: Encoder):
    trainer, model = train(config, encoder, tmp_path, "6ep")
    num_packs = packs_of(trainer)
    assert len(set(num_packs)) > 1 and max(num_packs) > num_packs[0]  # else the Trainer's own length would do
    assert int(trainer.state.timestamp.sample) == sum(num_packs) == len(model.seen)
    assert int(trainer.state.timestamp.batch) == sum(-(-packs // 2) for packs in num_packs)
    names = [sample.id for batch in model.seen for sample in batch["samples"]]
    assert sorted(names) == sorted(f"sample-{n}" for n in range(24) for _ in range(6))


def test_packs_samples_tokens_and_fill_are_logged(tmp_path: Path, config: RecipeConfig, encoder: Encoder):
    trainer, model = train(config, encoder, tmp_path, "1ep")
    metrics = logged(trainer)
    assert sum(metrics["data/samples"]) == 24
    assert metrics["data/samples_seen"] == np.cumsum(metrics["data/samples"]).tolist()
    assert sum(metrics["data/packs"]) == packs_of(trainer)[0]
    tokens = [batch["num_tokens"] for batch in model.seen]
    assert metrics["data/packing_fill"][0] == pytest.approx(sum(tokens[:2]) / 2 / 700)
    assert int(trainer.state.timestamp.token) == sum(tokens)
    assert metrics["data/skipped_samples"][-1] == 0


def test_a_resumed_run_counts_on_and_keeps_the_epochs_length(tmp_path: Path, config: RecipeConfig, encoder: Encoder):
    whole, model = train(config, encoder, tmp_path, "3ep")
    steps = int(whole.state.timestamp.batch)
    last = steps - 2  # within the third epoch
    folder = str(tmp_path / "checkpoints")
    train(config, encoder, tmp_path, f"{last}ba", save_folder=folder, save_interval="1ba", save_filename="ba{batch}.pt")
    resumed, tail = train(config, encoder, tmp_path, "3ep", load_path=f"{folder}/ba{last}.pt")
    assert int(resumed.state.timestamp.batch) == steps
    expected = [[sample.id for sample in batch["samples"]] for batch in model.seen]
    found = [[sample.id for sample in batch["samples"]] for batch in tail.seen]
    assert 0 < len(found) < len(expected) and found == expected[-len(found) :]
    assert logged(resumed)["data/samples_seen"][-1] == logged(whole)["data/samples_seen"][-1] == 72


def test_left_out_samples_are_told_every_epoch(tmp_path: Path, config: RecipeConfig, encoder: Encoder, caplog):
    config.train_loader.packing = PackingConfig(max_tokens=250, on_long_sample="skip")
    with caplog.at_level(logging.WARNING):
        _, model = train(config, encoder, tmp_path, "1ep")
    num_left_out = 24 - sum(batch["num_samples"] for batch in model.seen)
    assert num_left_out > 0
    assert f"epoch 0: {num_left_out} samples exceed the budget of a pack and are left out" in caplog.text


@pytest.fixture
def with_bad_pictures(tmp_path: Path, config: RecipeConfig, make_sample, write_shards) -> RecipeConfig:
    samples = [make_sample(n, 1, **({"image": b"no picture"} if n in (2, 5, 7) else {})) for n in range(9)]
    config.teachers = TeacherConfig()
    config.train_loader.streams = {"train": write_shards(tmp_path / "bad", samples)}
    config.train_loader.packing = PackingConfig(max_tokens=250)
    config.train_loader.on_bad_sample = "skip"
    return config


def test_skipped_samples_are_counted_and_listed(
    tmp_path: Path, with_bad_pictures: RecipeConfig, encoder: Encoder, caplog
):
    with caplog.at_level(logging.WARNING):
        trainer, _ = train(with_bad_pictures, encoder, tmp_path, "1ep")
    assert logged(trainer)["data/skipped_samples"][-1] == 3
    assert sum(logged(trainer)["data/samples"]) == 6
    rows = [json.loads(line) for line in (tmp_path / "skipped_samples.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == ["sample-2", "sample-5", "sample-7"]
    assert all("cannot decode an image" in row["reason"] and row["reason"] in caplog.text for row in rows)


def test_a_list_that_cannot_be_written_stops_no_rank(
    tmp_path: Path, with_bad_pictures: RecipeConfig, encoder: Encoder, caplog
):
    (tmp_path / "skipped_samples.jsonl").mkdir()
    trainer, _ = train(with_bad_pictures, encoder, tmp_path, "1ep")
    assert logged(trainer)["data/skipped_samples"][-1] == 3
    assert "cannot write skipped_samples.jsonl" in caplog.text and "training continues" in caplog.text


def test_too_many_bad_samples_stop_the_run(tmp_path: Path, with_bad_pictures: RecipeConfig, encoder: Encoder):
    with_bad_pictures.train_loader.max_bad_samples = 2
    with pytest.raises(
        RuntimeError, match=r"3 samples could not be used, above train_loader.max_bad_samples 2; .*sample-"
    ):
        train(with_bad_pictures, encoder, tmp_path, "1ep")
    assert len((tmp_path / "skipped_samples.jsonl").read_text().splitlines()) == 3


def test_a_bad_sample_counts_once_however_many_epochs(
    tmp_path: Path, with_bad_pictures: RecipeConfig, encoder: Encoder
):
    with_bad_pictures.train_loader.max_bad_samples = 3
    folder = str(tmp_path / "checkpoints")
    keywords: dict[str, Any] = {"save_folder": folder, "save_interval": "1ep", "save_filename": "ep{epoch}.pt"}
    trainer, _ = train(with_bad_pictures, encoder, tmp_path, "3ep", **keywords)
    assert logged(trainer)["data/skipped_samples"][-1] == 3
    resumed, _ = train(with_bad_pictures, encoder, tmp_path, "4ep", load_path=f"{folder}/ep3.pt")
    assert logged(resumed)["data/skipped_samples"][-1] == 3
    assert len((tmp_path / "skipped_samples.jsonl").read_text().splitlines()) == 3
