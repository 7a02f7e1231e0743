"""`recipe.data.evaluation`: which samples an evaluation answers, and that it begins with them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from composer import DataSpec
from torch.utils.data import DataLoader

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.config import AnswersConfig, LoaderConfig, RecipeConfig
from recipe.data.evaluation import ALL, NEVER, answer_order, put_answered_first
from recipe.data.loader import build_eval_loader
from recipe.records import RECORDS_FILE
from recipe.schema import Sample
from tests.support.tiny_cases import IMAGE_CHAT, TEXT_CHAT, make_config, make_encoder

NUM_SCENES = 9


def scenes() -> list[Sample]:
    """Nine scenes, and three samples whose answers no score reads: about a colour, not annotated, without an image."""
    found = list(iter_samples(num_samples=NUM_SCENES + 2, seed=4, image_size=56))
    found[2] = replace(found[2], id="chat", messages=IMAGE_CHAT)
    found[5] = replace(found[5], id="unknown", objects=None, messages=IMAGE_CHAT)
    return [*found, Sample("text", b"", 0, 0, None, TEXT_CHAT)]


def spec_of(config: RecipeConfig, folder: Path, samples: Sequence[Sample], batch_size: int = 2) -> DataSpec:
    write_split(iter(samples), str(folder), "val")
    loader = LoaderConfig(streams={"a": {"local": str(folder), "split": "val"}}, global_batch_size=batch_size)
    return build_eval_loader(loader, make_encoder(config), None, 0)


def ids(spec: DataSpec) -> list[str]:
    assert isinstance(spec.dataloader, DataLoader)
    return [sample.id for batches in spec.dataloader for batch in batches for sample in batch["samples"]]


@pytest.fixture(scope="module")
def config(tiny_checkpoint: str) -> RecipeConfig:
    return make_config(tiny_checkpoint)


def expected(num: int) -> set[str]:
    """The samples with the lowest hashes of their ids."""
    counted = [sample for sample in scenes() if sample.id not in ("chat", "unknown", "text")]
    return {sample.id for sample in sorted(counted, key=answer_order)[:num]}


def test_the_order_is_of_the_id_alone() -> None:
    scene = scenes()[0]
    assert answer_order(scene) == answer_order(replace(scene, image=b"", width=3, objects=())) < NEVER
    assert [sample.id for sample in scenes() if answer_order(sample) == NEVER] == ["chat", "unknown", "text"]


def test_the_chosen_come_first_and_the_rest_in_stored_order(config: RecipeConfig, tmp_path: Path) -> None:
    spec, stored = spec_of(config, tmp_path, scenes()), [sample.id for sample in scenes()]
    last = put_answered_first(spec, AnswersConfig(4))
    chosen = [name for name in stored if name in expected(4)]
    assert ids(spec) == chosen + [name for name in stored if name not in chosen]
    assert last is not None
    assert {sample.id for sample in scenes() if answer_order(sample) <= last} == expected(4)


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_neither_order_nor_batch_size_nor_other_samples_choose(
    config: RecipeConfig, tmp_path: Path, batch_size: int
) -> None:
    spec = spec_of(config, tmp_path, scenes()[::-1], batch_size)
    put_answered_first(spec, AnswersConfig(4))
    assert set(ids(spec)[:4]) == expected(4)
    others = [sample for sample in scenes() if sample.id not in expected(2)]  # the next two move up
    spec = spec_of(config, tmp_path / "fewer", others, batch_size)
    put_answered_first(spec, AnswersConfig(2))
    assert set(ids(spec)[:2]) == expected(4) - expected(2)


def test_ranks_share_the_chosen(config: RecipeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank r of 2 reads every second sample, so both have two of the four."""
    write_split(iter(scenes()), str(tmp_path), "val")
    for rank in range(2):
        loader = LoaderConfig(streams={"a": {"local": str(tmp_path), "split": "val"}}, global_batch_size=2)
        spec = build_eval_loader(loader, make_encoder(config), None, 0)
        assert isinstance(spec.dataloader, DataLoader)
        put_answered_first(spec, AnswersConfig(4))
        sampler = spec.dataloader.sampler
        monkeypatch.setattr(sampler, "num_replicas", 2)
        monkeypatch.setattr(sampler, "rank", rank)
        dataset = spec.dataloader.dataset
        first = [dataset[index].examples[0].sample.id for index in list(sampler)[:2]]
        assert len(expected(4) & set(first)) == 2


def test_a_set_without_records_is_read(config: RecipeConfig, tmp_path: Path) -> None:
    spec = spec_of(config, tmp_path, scenes())
    last = put_answered_first(spec, AnswersConfig(4))
    for path in (tmp_path / "val").glob("*.npz"):
        path.unlink()
    (tmp_path / "val" / RECORDS_FILE).unlink()
    loader = LoaderConfig(streams={"a": {"local": str(tmp_path), "split": "val"}}, global_batch_size=2)
    without = build_eval_loader(loader, make_encoder(config), None, 0)
    assert put_answered_first(without, AnswersConfig(4)) == last
    assert ids(without) == ids(spec)


def test_of_the_first_batches_alone(config: RecipeConfig, tmp_path: Path) -> None:
    """An evaluation of two batches of three reads six samples, of which four count."""
    spec, stored = spec_of(config, tmp_path, scenes(), batch_size=3), [sample.id for sample in scenes()]
    assert put_answered_first(spec, AnswersConfig(4), num_batches=2) == ALL
    assert set(ids(spec)[:6]) == set(stored[:6])
    assert set(ids(spec)[:4]) == set(stored[:6]) - {"chat", "unknown"}


@pytest.mark.parametrize("num", [NUM_SCENES, 100])
def test_all_that_count_may_be_answered(config: RecipeConfig, tmp_path: Path, num: int) -> None:
    spec = spec_of(config, tmp_path, scenes())
    assert put_answered_first(spec, AnswersConfig(num)) == ALL
    assert set(ids(spec)[-3:]) == {"chat", "unknown", "text"}


def test_none_may_count(config: RecipeConfig, tmp_path: Path) -> None:
    spec = spec_of(config, tmp_path, [sample for sample in scenes() if sample.id in ("chat", "unknown", "text")])
    assert put_answered_first(spec, AnswersConfig(4)) == -1
    assert ids(spec) == ["chat", "unknown", "text"]


def test_without_answers_the_order_stays(config: RecipeConfig, tmp_path: Path) -> None:
    spec = spec_of(config, tmp_path, scenes())
    assert put_answered_first(spec, None) is None
    assert ids(spec) == [sample.id for sample in scenes()]
