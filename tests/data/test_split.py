"""`val_fraction`: both loaders agree, an image never changes its side, and nothing is on both."""

import gzip
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from recipe.config import ConfigError, LoaderConfig, PackingConfig, RecipeConfig
from recipe.data.encode import Encoder
from recipe.data.loader import build_eval_loader, build_train_loader
from recipe.data.split import ImageHashes, Split, evaluation_loader, split_streams
from recipe.data.stream import PackStream
from recipe.losses.counts import split_batch
from recipe.records import RECORDS_FILE
from recipe.schema import Batch, Sample
from recipe.upstream.storage import open_streams

NUM_SAMPLES = 24
FRACTION = 0.3
CHATS = [
    ({"role": "user", "content": f"hello {number}"}, {"role": "assistant", "content": "ho"}) for number in range(2)
]


@pytest.fixture(scope="module")
def samples(make_sample) -> list[Sample]:
    """Images, the first one in three samples; and two chats without an image."""
    pictures = [make_sample(number, 1, 28 + 9 * number, 60) for number in range(NUM_SAMPLES)]
    again = [replace(pictures[0], id=f"again-{number}") for number in range(2)]
    return [*pictures, *again, *(Sample(f"text-{number}", b"", 0, 0, None, chat) for number, chat in enumerate(CHATS))]


@pytest.fixture
def config(tmp_path: Path, samples: list[Sample], write_shards) -> RecipeConfig:
    return RecipeConfig(
        seed=3,
        val_fraction=FRACTION,
        train_loader=LoaderConfig(
            streams={"train": write_shards(tmp_path / "train", samples)},
            global_batch_size=1,
            collator="packed",
            packing=PackingConfig(max_tokens=400),
            dataset={"shuffle": True},
        ),
        eval_loader=LoaderConfig(streams={}, global_batch_size=2),
    )


def ids(batches: Iterable[list[Batch]]) -> list[str]:
    return [sample.id for batch in batches for item in batch for sample in item["samples"] if item["num_samples"]]


def training_loader(config: RecipeConfig, encoder: Encoder) -> DataLoader:
    spec = build_train_loader(config.train_loader, encoder, None, config.seed, 1, split_batch, config.val_fraction)
    assert isinstance(spec.dataloader, DataLoader)
    return spec.dataloader


def validation_loader(config: RecipeConfig, encoder: Encoder) -> DataLoader:
    spec = build_eval_loader(evaluation_loader(config), encoder, None, config.seed, config.val_fraction)
    assert isinstance(spec.dataloader, DataLoader)
    assert spec.num_samples == len(spec.dataloader.dataset)  # pyright: ignore[reportArgumentType]
    return spec.dataloader


def validation_ids(config: RecipeConfig, encoder: Encoder) -> set[str]:
    return set(ids(validation_loader(config, encoder)))


@pytest.mark.parametrize("packing", [PackingConfig(max_tokens=400), None])
def test_every_sample_is_on_one_side(
    config: RecipeConfig, encoder: Encoder, samples: list[Sample], packing: Any, caplog: pytest.LogCaptureFixture
):
    config.train_loader.packing = packing
    caplog.set_level("INFO")
    trained = [ids(training_loader(config, encoder)) for _ in range(2)]
    validated = ids(validation_loader(config, encoder))
    assert sorted(trained[0] + validated) == sorted(sample.id for sample in samples)
    assert sorted(trained[1]) == sorted(trained[0])
    of_first = {"sample-0", "again-0", "again-1"}  # one image
    assert of_first <= set(trained[0]) or of_first <= set(validated)
    assert validated == [sample.id for sample in samples if sample.id in validated]  # in stored order
    texts = sum(name.startswith("text") for name in validated)
    images = len({re.sub("again-.", "sample-0", name) for name in validated})
    assert f"validation: {images} of {NUM_SAMPLES + 2} images" in caplog.text
    assert 0 < images - texts < NUM_SAMPLES


def test_an_image_stays_where_it_is(
    config: RecipeConfig, encoder: Encoder, samples: list[Sample], tmp_path: Path, make_sample, write_shards
):
    """Other images, another order, other shards, streams, ids, seeds or workers move none."""
    before = validation_ids(config, encoder)
    more = [make_sample(100 + number, 1) for number in range(20)]
    config.train_loader.streams = {
        "new": write_shards(tmp_path / "new", [*more, *reversed(samples[10:])]),
        "rest": {**write_shards(tmp_path / "rest", samples[:10]), "repeat": 2},
    }
    config.seed = 4
    config.eval_loader.dataloader = {"num_workers": 2}
    names = {sample.id for sample in samples}
    assert {name for name in validation_ids(config, encoder) if name in names} == before
    trained = ids(training_loader(config, encoder))
    assert not before & set(trained)
    assert sum(name == "sample-1" for name in trained) == (0 if "sample-1" in before else 2)  # repeated


def test_the_side_is_that_of_the_hash():
    hashes = np.array([0, 2**62 - 1, 2**62, 2**63, 2**64 - 1], dtype=np.uint64)
    assert Split(0.25, held(hashes)).is_validation.tolist() == [True, True, False, False, False]
    assert Split(0.5, held(hashes)).describe() == "3 of 5 images"
    assert Split(0.25, held(np.append(hashes, [np.uint64(0)]))).describe() == "2 of 5 images, 3 of 6 samples"


def test_a_sample_of_several_images_is_held_out_if_one_of_them_is():
    hashes = np.array([2**62, 2**63, 2**63], dtype=np.uint64)
    split = Split(0.25, held(hashes, further=[5, 2**63, 2**62], owners=[1, 1, 2]))
    assert split.is_validation.tolist() == [False, True, False]
    assert split.describe() == "1 of 3 images"


def held(hashes: np.ndarray, further: list[int] | None = None, owners: list[int] | None = None) -> ImageHashes:
    return ImageHashes(hashes, np.array(further or [], dtype=np.uint64), np.array(owners or [], dtype=np.int64))


def test_a_side_that_would_be_empty_is_refused(config: RecipeConfig):
    streams = open_streams(config.train_loader.streams)
    with pytest.raises(ConfigError, match=r"leaves nothing for validation: it holds out 0 of 26 images.* Raise it"):
        split_streams(streams, 1e-9)
    with pytest.raises(ConfigError, match=r"leaves nothing for training: it holds out 26 of 26 images.* Lower it"):
        split_streams(streams, 1 - 1e-9)
    assert split_streams(streams, None) is None


def test_records_of_an_earlier_version_are_refused(config: RecipeConfig):
    path = Path(config.train_loader.streams["train"]["local"], RECORDS_FILE)
    with gzip.open(path) as file:
        lines = [json.loads(line) for line in file]
    with gzip.open(path, "wb") as file:
        for line in lines:
            file.write(json.dumps({key: line[key] for key in line if key != "image_hash"}).encode() + b"\n")
    with pytest.raises(ConfigError, match="holds no hashes of images"):
        split_streams(open_streams(config.train_loader.streams), FRACTION)
    path.unlink()
    with pytest.raises(ConfigError, match=r"give eval_loader.streams instead of val_fraction"):
        split_streams(open_streams(config.train_loader.streams), FRACTION)


@pytest.mark.parametrize("side", ["validation", "training"])
def test_too_long_is_judged_on_the_side_that_reads_it(
    config: RecipeConfig, encoder: Encoder, samples: list[Sample], tmp_path: Path, write_shards, make_sample, side: str
):
    """The answer of one image is long; only the loader that reads it refuses."""
    validated = validation_ids(config, encoder)
    number = next(n for n in range(1, NUM_SAMPLES) if (f"sample-{n}" in validated) == (side == "validation"))
    samples = list(samples)
    samples[number] = replace(samples[number], objects=make_sample(number, 40).objects)
    config.train_loader.streams = {"train": write_shards(tmp_path / "long", samples)}
    short = replace(encoder, max_seq_len=400)
    for packing in (PackingConfig(), None):
        config.train_loader.packing = packing
        if side == "validation":
            training_loader(config, short)
            with pytest.raises(ConfigError, match=f"eval_loader: 1 of 28 samples .*'sample-{number}'"):
                validation_loader(config, short)
        else:
            validation_loader(config, short)
            with pytest.raises(ConfigError, match=f"1 (of 28 )?samples .*'sample-{number}'"):
                training_loader(config, short)


def test_a_resume_with_another_fraction_is_refused(config: RecipeConfig, encoder: Encoder):
    def dataset(fraction: float | None) -> PackStream:
        loader = training_loader(replace(config, val_fraction=fraction), encoder)
        next(iter(loader))  # an epoch has begun
        assert isinstance(loader.dataset, PackStream)
        return loader.dataset

    state = dataset(FRACTION).state_dict(1, True)
    dataset(FRACTION).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"val_fraction was 0.3, now None"):
        dataset(None).load_state_dict(state)
    older = dataset(None).state_dict(1, True)
    del older["plan"]["val_fraction"]
    dataset(None).load_state_dict(older)
    with pytest.raises(ConfigError, match=r"val_fraction was None, now 0.3"):
        dataset(FRACTION).load_state_dict(older)


def test_a_cache_is_not_shared_and_sampling_is_for_training(config: RecipeConfig):
    config.train_loader.streams = {
        "near": {"local": "a", "split": "train", "repeat": 2},
        "far": {"local": "cache/", "remote": "s3://bucket/set", "choose": 5},
    }
    assert evaluation_loader(config).streams == {
        "near": {"local": "a", "split": "train"},
        "far": {"local": "cache-validation", "remote": "s3://bucket/set"},
    }
    assert evaluation_loader(replace(config, val_fraction=None)) is config.eval_loader
