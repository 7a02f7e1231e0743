"""`recipe.data.contents`: what a run says of its data is what its loader reads."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from composer.core import DataSpec
from torch.utils.data import DataLoader

from recipe.config import LoaderConfig, PackingConfig, TeacherConfig
from recipe.data.contents import epoch_contents
from recipe.data.encode import Encoder
from recipe.data.loader import build_train_loader, tokens_per_batch
from recipe.data.stream import PackStream
from recipe.data.teachers import TeacherPool
from recipe.losses.counts import split_batch
from recipe.records import RECORDS_FILE
from recipe.schema import Object, Sample

CHAT = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "a red star"})
PACKING = PackingConfig(max_tokens=600, window=8)


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory, make_sample, write_shards) -> dict[str, dict[str, Any]]:
    """`main` holds five samples of four images, with 0 to 3 objects and a crowd; `other` an image and a text, twice."""
    folder = tmp_path_factory.mktemp("streams")
    samples = [make_sample(number, number) for number in range(4)]
    crowd = Object((1.0, 1.0, 9.0, 9.0), "stars", iscrowd=True)
    samples.append(replace(samples[3], id="again", objects=(*samples[3].objects, crowd)))
    others = [make_sample(9, None), Sample("text", b"", 0, 0, None, CHAT)]
    return {
        "main": write_shards(folder / "main", samples),
        "other": {**write_shards(folder / "other", others), "repeat": 2},
    }


@pytest.fixture(scope="module")
def pool(make_sample) -> TeacherPool:
    config = TeacherConfig(num_teachers=1, teacher_ratio=0.5)
    return TeacherPool([make_sample(50 + number, number) for number in range(3)], config, 3)


def open_spec(
    streams: dict[str, dict[str, Any]],
    encoder: Encoder,
    packing: PackingConfig | None,
    *more: Any,
    num_canonical_nodes: int = 1,
    **options: Any,
) -> DataSpec:
    dataset = {"shuffle": True, "num_canonical_nodes": num_canonical_nodes}
    loader = LoaderConfig(streams=streams, global_batch_size=2, collator="packed", packing=packing, dataset=dataset)
    teachers, val_fraction = (*more, None, None)[:2]
    return build_train_loader(loader, encoder, teachers, 3, 1, split_batch, val_fraction, **options)


def dataset_of(spec: DataSpec) -> PackStream:
    assert isinstance(spec.dataloader, DataLoader) and isinstance(spec.dataloader.dataset, PackStream)
    return spec.dataloader.dataset


def read(spec: DataSpec) -> Sequence[Any]:
    return [item for batch in spec.dataloader for item in batch]


@pytest.mark.parametrize("packing", [None, PACKING])
def test_counts_by_hand(streams: dict[str, dict[str, Any]], encoder: Encoder, packing: PackingConfig | None):
    contents = epoch_contents(dataset_of(open_spec(streams, encoder, packing)), 0)
    assert (contents.num_stored, contents.num_images, contents.num_objects) == (7, 5, 0 + 1 + 2 + 3 + 3)
    assert contents.samples_per_image == 6 / 5  # the text has none
    assert contents.num_samples == 5 + 2 * 2 and contents.passes == {"main": 1.0, "other": 2.0}


@pytest.mark.parametrize("with_answers", [True, False])
@pytest.mark.parametrize("packing", [None, PACKING])
def test_tokens_are_those_that_the_loader_reads(
    streams: dict[str, dict[str, Any]],
    encoder: Encoder,
    pool: TeacherPool,
    packing: PackingConfig | None,
    with_answers: bool,
):
    """With teachers, of both kinds of epoch; and so are the tokens of a step."""
    spec = open_spec(streams, encoder, packing, pool, answers_at_start=with_answers)
    contents, batches = epoch_contents(dataset_of(spec), 0), read(spec)
    other = read(open_spec(streams, encoder, packing, pool, answers_at_start=not with_answers))
    assert contents.tokens == sum(item["num_tokens"] for item in batches)
    assert contents.tokens_otherwise == sum(item["num_tokens"] for item in other) != contents.tokens
    assert contents.num_packs == len(batches)
    assert contents.tokens is not None
    loader = LoaderConfig(global_batch_size=2, packing=packing)
    assert tokens_per_batch(loader, spec) == pytest.approx(2 * contents.tokens / len(batches))


def test_tokens_of_a_step_are_the_same_at_a_resume(streams: dict[str, dict[str, Any]], encoder: Encoder):
    """On one machine instead of two: the plan is then that of the checkpoint."""
    loader = LoaderConfig(global_batch_size=2, packing=PACKING)
    begun = open_spec(streams, encoder, PACKING, num_canonical_nodes=2)
    resumed = open_spec(streams, encoder, PACKING, num_canonical_nodes=0)
    dataset_of(resumed).check_plan(dataset_of(begun).state_dict(0, True))
    assert dataset_of(resumed).plan(0).num_packs == dataset_of(begun).plan(0).num_packs
    assert tokens_per_batch(loader, resumed) == tokens_per_batch(loader, begun)


def test_what_is_held_out_does_not_count(streams: dict[str, dict[str, Any]], encoder: Encoder):
    dataset = dataset_of(open_spec({"main": streams["main"]}, encoder, PACKING, None, 0.5))
    contents = epoch_contents(dataset, 0)
    assert contents.num_stored == dataset.is_trained.sum() == contents.num_samples in range(1, 5)
    objects = [3 if number == 4 else number for number in range(5)]
    assert contents.num_objects == sum(objects[number] for number in dataset.is_trained.nonzero()[0])


def test_without_records_only_samples_are_known(tmp_path: Path, encoder: Encoder, make_sample, write_shards):
    stream = write_shards(tmp_path / "bare", [make_sample(number) for number in range(4)])
    (tmp_path / "bare" / RECORDS_FILE).unlink()
    spec = open_spec({"bare": stream}, encoder, None)
    contents = epoch_contents(dataset_of(spec), 0)
    assert (contents.num_stored, contents.num_images, contents.num_objects, contents.tokens) == (4, None, None, None)
    tokens = sum(item["num_tokens"] for item in read(spec))
    assert tokens_per_batch(LoaderConfig(global_batch_size=2), spec) == pytest.approx(tokens / 2)
