"""The loaders: microbatches, counts, resumption, workers, teachers, evaluation without double counting."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from composer.core import DataSpec
from torch.utils.data import DataLoader

from recipe.config import ConfigError, LoaderConfig, RecipeConfig, TeacherConfig
from recipe.data import loader as loader_module
from recipe.data.encode import Encoder
from recipe.data.evaluation import EvalSampler, EvalSamples
from recipe.data.loader import (
    build_eval_loader,
    build_train_loader,
    device_batch_size,
    get_num_packs_in_batch,
    get_num_samples_in_batch,
    get_num_tokens_in_batch,
    make_collator,
)
from recipe.data.maker import ExampleMaker
from recipe.data.stream import read_teachers
from recipe.losses.counts import count_losses, split_batch
from recipe.schema import Batch

NUM_SAMPLES = 10


def train_spec(config: RecipeConfig, encoder: Encoder, microbatch_size: int) -> DataSpec:
    """The training loader with the teachers that the configuration asks for."""
    return build_train_loader(
        config.train_loader,
        encoder,
        read_teachers(config.teachers, config.seed),
        config.seed,
        microbatch_size,
        split_batch,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, make_sample, write_shards) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("shards")
    stream = write_shards(folder / "train", [make_sample(number, number % 3) for number in range(NUM_SAMPLES)])
    # The pool shares two samples with the training set.
    pool = write_shards(folder / "pool", [make_sample(number) for number in (0, 1, 100, 101)])
    return stream, pool


@pytest.fixture
def config(shards: tuple[dict, dict]) -> RecipeConfig:
    stream, pool = shards
    return RecipeConfig(
        seed=3,
        teachers=TeacherConfig(stream=pool, num_teachers=1, teacher_ratio=0.7),
        train_loader=LoaderConfig(streams={"train": stream}, global_batch_size=4, dataset={"shuffle": True}),
        eval_loader=LoaderConfig(streams={"eval": stream}, global_batch_size=4),
    )


def dataloader_of(spec) -> DataLoader:
    assert isinstance(spec.dataloader, DataLoader)
    return spec.dataloader


def flat(batches: list[list[Batch]]) -> list[tuple[str, list[int], list[int]]]:
    """Per microbatch: ids, tokens and noise of what the model would see."""
    return [
        (" ".join(sample.id for sample in item["samples"]), item["input_ids"].flatten().tolist(), item["noise_seeds"])
        for batch in batches
        for item in batch
    ]


def ids(batches: list[list[Batch]]) -> list[str]:
    return [sample.id for batch in batches for item in batch for sample in item["samples"]]


def test_a_batch_is_a_list_of_microbatches_of_the_asked_size(config: RecipeConfig, encoder: Encoder):
    spec = train_spec(config, encoder, microbatch_size=3)
    sizes = [[len(item["samples"]) for item in batch] for batch in dataloader_of(spec)]
    assert sizes == [[3, 1], [3, 1], [2]]


@pytest.mark.parametrize("collator", ["standard", "packed"])
def test_counts_are_those_of_the_whole_batch_in_every_microbatch(config: RecipeConfig, encoder: Encoder, collator: str):
    config.train_loader.collator = collator
    batch = next(iter(dataloader_of(train_spec(config, encoder, microbatch_size=1))))
    whole = next(iter(dataloader_of(train_spec(config, encoder, microbatch_size=4))))
    expected = count_losses(whole[0])
    split = split_batch(batch, 1)
    assert len(split) == 4
    for item in split:
        assert item["loss_counts"] == {**expected, "microbatches": 4.0}
    assert expected["objects"] == sum(len(sample.objects or ()) for sample in whole[0]["samples"])
    assert expected["images"] == 4
    assert expected["teacher_tokens"] > 0
    assert expected["student_tokens"] > 0


def test_sample_and_token_counts_of_lists_and_microbatches(config: RecipeConfig, encoder: Encoder):
    batch = next(iter(dataloader_of(train_spec(config, encoder, microbatch_size=3))))
    assert get_num_samples_in_batch(batch) == get_num_packs_in_batch(batch) == 4
    assert [get_num_samples_in_batch(item) for item in batch] == [3, 1]
    assert [get_num_packs_in_batch(item) for item in batch] == [3, 1]
    real = sum(int((item["attention_mask"] == 1).sum()) for item in batch)
    assert get_num_tokens_in_batch(batch) == {"total": real, "loss_generating": 2}
    assert get_num_tokens_in_batch(batch[0])["loss_generating"] == 1


def test_the_trainer_may_not_expect_smaller_microbatches(config: RecipeConfig, encoder: Encoder):
    batch = next(iter(dataloader_of(train_spec(config, encoder, microbatch_size=4))))
    with pytest.raises(AssertionError, match="device_train_microbatch_size is 2"):
        split_batch(batch, 2)


def test_workers_change_nothing_over_two_epochs(config: RecipeConfig, encoder: Encoder):
    alone = dataloader_of(train_spec(config, encoder, microbatch_size=2))
    epochs = [flat(list(alone)) for _ in range(2)]
    config.train_loader.dataloader = {"num_workers": 2, "persistent_workers": True}
    # Streaming deals whole batches to its workers in turn, so the order is that of one process.
    shared = dataloader_of(train_spec(config, encoder, microbatch_size=2))
    assert [flat(list(shared)) for _ in range(2)] == epochs
    assert epochs[0] != epochs[1]


def test_without_workers_their_keywords_do_not_apply(config: RecipeConfig, encoder: Encoder):
    """`num_workers: 0` on the command line leaves the yaml's `prefetch_factor`, which torch refuses then."""
    config.train_loader.dataloader = {"num_workers": 0, "prefetch_factor": 2, "persistent_workers": True}
    assert dataloader_of(train_spec(config, encoder, microbatch_size=2)).num_workers == 0
    config.train_loader.dataloader = {"num_workers": 1, "prefetch_factor": None}  # dropped
    assert dataloader_of(train_spec(config, encoder, microbatch_size=2)).prefetch_factor == 2  # torch's own
    config.train_loader.dataloader = {"num_workers": 1, "prefetch_factor": 3}
    assert dataloader_of(train_spec(config, encoder, microbatch_size=2)).prefetch_factor == 3


def test_teachers_and_noise_change_with_the_epoch_only(config: RecipeConfig, encoder: Encoder):
    config.train_loader.dataset = {"shuffle": False}
    config.train_loader.global_batch_size = 1
    loader = dataloader_of(train_spec(config, encoder, microbatch_size=1))
    first, second = flat(list(loader)), flat(list(loader))
    assert [row[0] for row in first] == [row[0] for row in second]
    assert sum(a[1] != b[1] for a, b in zip(first, second, strict=True)) >= 3
    assert all(a[2] != b[2] for a, b in zip(first, second, strict=True))
    config.train_loader.dataset = {"shuffle": True}
    shuffled = flat(list(dataloader_of(train_spec(config, encoder, microbatch_size=1))))
    assert sorted(shuffled) == sorted(first)
    assert shuffled != first


@pytest.mark.parametrize(("num_workers", "steps"), [(0, 1), (0, 2), (0, 3), (0, 4), (2, 2), (2, 3)])
def test_resumes_through_streamings_state(config: RecipeConfig, encoder: Encoder, num_workers: int, steps: int):
    config.train_loader.dataloader = {"num_workers": num_workers}
    loader = dataloader_of(train_spec(config, encoder, microbatch_size=4))
    batches = [list(loader) for _ in range(3)]
    expected = flat([batch for epoch in batches for batch in epoch][steps:])

    loader = dataloader_of(train_spec(config, encoder, microbatch_size=4))
    state = None
    steps_of_epoch = steps % 3
    for epoch in range(steps // 3 + (steps_of_epoch > 0)):
        iterator = iter(loader)
        limit = steps_of_epoch if epoch == steps // 3 else 3
        seen = sum(get_num_packs_in_batch(next(iterator)) for _ in range(limit))
        if limit == 3:
            assert list(iterator) == []
            seen = 0
        state = loader.dataset.state_dict(seen, True)  # pyright: ignore[reportAttributeAccessIssue]
        del iterator
    assert state is not None

    resumed = dataloader_of(train_spec(config, encoder, microbatch_size=4))
    resumed.dataset.load_state_dict(state)  # pyright: ignore[reportAttributeAccessIssue]
    found = []
    while len(found) < len(expected):
        found += flat(list(resumed))
    assert found == expected


def test_evaluation_reads_every_sample_once_in_stored_order(config: RecipeConfig, encoder: Encoder):
    spec = build_eval_loader(config.eval_loader, encoder, read_teachers(config.teachers, config.seed), config.seed)
    batches = list(dataloader_of(spec))
    assert ids(batches) == [f"sample-{number}" for number in range(NUM_SAMPLES)]
    assert [len(batch) for batch in batches] == [1, 1, 1]
    assert spec.split_batch(batches[0], 2) is batches[0]
    assert flat(list(dataloader_of(spec))) == flat(batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 16])
def test_ranks_take_equal_steps_and_no_sample_counts_twice(
    config: RecipeConfig, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, world_size: int
):
    maker = ExampleMaker(encoder, None, seed=0)
    dataset = EvalSamples(maker, streams=loader_module.open_streams(config.eval_loader.streams), batch_size=1)
    scored, steps = [], []
    for rank in range(world_size):
        monkeypatch.setattr("recipe.data.evaluation.dist.get_world_size", lambda: world_size)
        monkeypatch.setattr("recipe.data.evaluation.dist.get_global_rank", lambda rank=rank: rank)
        indices = list(EvalSampler(dataset))
        steps.append(len(indices))
        scored += [index for index in indices if index >= 0]
    assert len(set(steps)) == 1
    assert sorted(scored) == list(range(NUM_SAMPLES))


def test_inert_samples_count_for_nothing(config: RecipeConfig, encoder: Encoder):
    maker = ExampleMaker(encoder, None, seed=0)
    dataset = EvalSamples(maker, streams=loader_module.open_streams(config.eval_loader.streams), batch_size=1)
    packs = [dataset[2], dataset[-3]]
    example, inert = (pack.examples[0] for pack in packs)
    assert inert.sample.id == example.sample.id
    assert torch.equal(inert.input_ids, example.input_ids)
    assert inert.student_images == [0]
    batch = make_collator("standard", encoder.pad_token_id)(packs)
    alone = make_collator("standard", encoder.pad_token_id)(packs[:1])
    assert count_losses(batch) == count_losses(alone)
    assert get_num_samples_in_batch([batch]) == 1
    assert len(batch["student_images"]) == 2


def test_what_goes_to_spawned_workers_survives_pickling(encoder: Encoder, make_sample):
    maker = ExampleMaker(encoder, None, seed=5)
    row = make_sample().to_mds()
    copy = pickle.loads(pickle.dumps(maker))
    assert torch.equal(copy(row, 1, 2).input_ids, maker(row, 1, 2).input_ids)
    assert copy(row, 1, 2).noise_seeds == maker(row, 1, 2).noise_seeds


def test_a_bad_sample_is_named(tmp_path: Path, encoder: Encoder, make_sample, write_shards):
    stream = write_shards(tmp_path / "bad", [make_sample(7, image=b"no picture")])
    loader = LoaderConfig(streams={"bad": stream}, global_batch_size=1)
    spec = train_spec(RecipeConfig(train_loader=loader), encoder, microbatch_size=1)
    with pytest.raises(ValueError, match=r"sample-7.*cannot decode"):
        next(iter(dataloader_of(spec)))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"local": "{tmp}/none"}, "stream 'a'.*none does not exist.*convert"),
        ({"local": "{tmp}"}, "holds no index.json.*convert"),
        ({"remote": "{tmp}", "local": "{tmp}/cache", "split": "train"}, "train does not exist"),
        ({}, "neither `local` nor `remote`"),
    ],
)
def test_missing_shards_are_named_before_streaming_starts(tmp_path: Path, keywords: dict[str, str], message: str):
    filled = {key: value.format(tmp=tmp_path) for key, value in keywords.items()}
    with pytest.raises(ValueError, match=message):
        loader_module.open_streams({"a": filled})


def test_no_stream_at_all_is_refused():
    with pytest.raises(ValueError, match="no stream"):
        loader_module.open_streams({})


def test_a_batch_that_ranks_do_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recipe.data.loader.dist.get_world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"global_batch_size 4 .* 3 ranks"):
        device_batch_size(LoaderConfig(global_batch_size=4))
    assert device_batch_size(LoaderConfig(global_batch_size=6)) == 2


def test_an_unknown_collator_is_refused():
    with pytest.raises(ValueError, match="'paked'"):
        make_collator("paked", 0)


def test_teachers_without_a_pool_are_refused(config: RecipeConfig, encoder: Encoder):
    config.teachers = TeacherConfig(stream=None, num_teachers=1)
    with pytest.raises(ValueError, match=r"teachers\.stream is null"):
        train_spec(config, encoder, microbatch_size=1)


@pytest.mark.parametrize("which", ["train", "eval"])
def test_an_epoch_without_batches_is_refused(config: RecipeConfig, encoder: Encoder, which: str) -> None:
    loader = replace(getattr(config, f"{which}_loader"), global_batch_size=16, dataloader={"drop_last": True})
    with pytest.raises(ConfigError, match=rf"{which}_loader: an epoch has no batches, as it has 10 .*drop_last=false"):
        if which == "train":
            train_spec(replace(config, train_loader=loader), encoder, 1)
        else:
            build_eval_loader(loader, encoder, None, 0)


def test_what_an_evaluation_drops_is_reported(
    config: RecipeConfig, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    build_eval_loader(replace(config.eval_loader, dataloader={"drop_last": True}), encoder, None, 0)
    assert "drop_last leaves out 2 of 10 samples" in caplog.text


@pytest.mark.parametrize("bad", [[0], [3, 4], [9]])
def test_an_evaluation_skips_broken_images_if_asked(
    tmp_path: Path, make_sample, write_shards, config: RecipeConfig, encoder: Encoder, bad: list[int]
) -> None:
    samples = [make_sample(number, 1) for number in range(NUM_SAMPLES)]
    samples = [replace(item, image=b"broken") if at in bad else item for at, item in enumerate(samples)]
    loader = replace(config.eval_loader, streams={"eval": write_shards(tmp_path / "bad", samples)})
    with pytest.raises(ValueError, match=f"sample-{bad[0]}"):
        list(dataloader_of(build_eval_loader(loader, encoder, None, 0)))
    batches = list(dataloader_of(build_eval_loader(replace(loader, on_bad_sample="skip"), encoder, None, 0)))
    microbatches = [item for batch in batches for item in batch]
    assert sorted(name for item in microbatches for name in item["skipped"]) == [f"sample-{at}" for at in bad]
    assert sum(get_num_samples_in_batch(batch) for batch in batches) == NUM_SAMPLES - len(bad)
