"""The packed training stream: every sample once in its planned pack, resumed anywhere, refused when plans change."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from recipe.config import LoaderConfig, PackingConfig, PromptConfig, RecipeConfig, TeacherConfig
from recipe.data.encode import Encoder
from recipe.data.loader import build_train_loader, get_num_packs_in_batch, tokens_per_batch
from recipe.data.stream import PackStream, read_teachers
from recipe.losses.counts import split_batch
from recipe.schema import Batch, Sample

NUM_SAMPLES = 40
MAX_TOKENS = 400
BATCH_SIZE = 2
CHAT = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "a red star"})
Content = list[tuple[str, tuple[int, ...]]]  # of each sample: its id and tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_sample, make_chat, write_shards) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("data")
    samples = [make_sample(number, number % 4, 28 + 9 * number, 60) for number in range(NUM_SAMPLES - 4)]
    samples += [Sample(f"text-{number}", b"", 0, 0, None, CHAT) for number in range(2)]
    samples += [make_chat(number, 2 + number) for number in range(2)]
    return {
        "train": write_shards(folder / "train", samples),
        "other": write_shards(folder / "other", [make_sample(number, 1) for number in range(200, 212)]),
        "pool": write_shards(folder / "pool", [make_sample(number) for number in (0, 1, 100, 101)]),
    }


@pytest.fixture
def config(data: dict[str, dict[str, str]]) -> RecipeConfig:
    return RecipeConfig(
        seed=3,
        teachers=TeacherConfig(stream=data["pool"], num_teachers=1, teacher_ratio=0.5),
        train_loader=LoaderConfig(
            streams={"train": data["train"]},
            global_batch_size=BATCH_SIZE,
            collator="packed",
            packing=PackingConfig(max_tokens=MAX_TOKENS, window=16),
            dataset={"shuffle": True},
        ),
    )


def open_loader(config: RecipeConfig, encoder: Encoder, **dataloader: Any) -> DataLoader:
    config.train_loader.dataloader = dataloader
    spec = build_train_loader(
        config.train_loader, encoder, read_teachers(config.teachers, config.seed), config.seed, 1, split_batch
    )
    assert isinstance(spec.dataloader, DataLoader)
    return spec.dataloader


def dataset_of(loader: DataLoader) -> PackStream:
    assert isinstance(loader.dataset, PackStream)
    return loader.dataset


def content(batches: Iterable[list[Batch]]) -> list[Content]:
    """Of each step."""
    steps = []
    for batch in batches:
        step: Content = []
        for item in batch:
            assert item["segment_lengths"] is not None
            rows = item["input_ids"][0].split(item["segment_lengths"])
            step += [(sample.id, tuple(ids.tolist())) for sample, ids in zip(item["samples"], rows, strict=True)]
        steps.append(step)
    return steps


def ids_of(steps: list[Content]) -> list[str]:
    return [name for step in steps for name, _ in step]


def test_an_epoch_holds_every_sample_once_in_full_packs(config: RecipeConfig, encoder: Encoder):
    loader = open_loader(config, encoder)
    dataset = dataset_of(loader)
    for epoch in range(3):
        dataset.epoch_of_length = epoch
        batches = list(loader)
        assert len(batches) == len(loader)
        microbatches = [item for batch in batches for item in batch]
        assert sorted(ids_of(content(batches))) == sorted(dataset[i]["id"] for i in range(NUM_SAMPLES))
        assert [item["num_packs"] for item in microbatches] == [1] * dataset.plan(epoch).num_packs
        lengths = [item["num_tokens"] for item in microbatches]
        assert max(lengths) <= MAX_TOKENS
        assert sum(lengths) / MAX_TOKENS / len(lengths) > 0.85
        assert lengths == np.add.reduceat(dataset.plan(epoch).tokens, dataset.plan(epoch).offsets[:-1]).tolist()


def test_epochs_differ_and_workers_do_not(config: RecipeConfig, encoder: Encoder):
    loader = open_loader(config, encoder)
    epochs = [content(loader) for _ in range(2)]
    assert epochs[0] != epochs[1]
    shared = open_loader(config, encoder, num_workers=2)
    assert [content(shared) for _ in range(2)] == epochs


@pytest.mark.parametrize(("num_workers", "steps"), [(0, 1), (0, 5), (2, 4), (2, 6)])
def test_resumes_with_the_pack_after_the_last(config: RecipeConfig, encoder: Encoder, num_workers: int, steps: int):
    loader = open_loader(config, encoder)
    expected = content(loader)
    assert len(expected) > 6
    second = content(loader)

    loader = open_loader(config, encoder, num_workers=num_workers)
    iterator = iter(loader)
    seen = sum(get_num_packs_in_batch(next(iterator)) for _ in range(steps))
    state = dataset_of(loader).state_dict(seen, True)
    del iterator

    resumed = open_loader(config, encoder, num_workers=2 - num_workers)
    dataset_of(resumed).load_state_dict(state)
    assert content(resumed) == expected[steps:]
    assert content(resumed) == second


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: replace(c, seed=4), "seed was 3, 3, now 4, 4"),
        (
            lambda c: with_loader(c, packing=PackingConfig(max_tokens=MAX_TOKENS + 1, window=16)),
            "packing was .*400.*401",
        ),
        (lambda c: with_loader(c, packing=None), "packing was .*, now None"),
        (lambda c: with_loader(c, dataset={"shuffle": False}), "shuffle was .*py1e.*, now None"),
        (lambda c: replace(c, teachers=TeacherConfig()), r"teachers \(teachers.stream, num_teachers"),
        (
            lambda c: with_loader(c, dataset={"shuffle": True, "num_canonical_nodes": 4}),
            "num_canonical_nodes was 1, now 4",
        ),
        (
            lambda c: with_loader(c, streams={"train": {**c.train_loader.streams["train"], "choose": 9}}),
            r"streams.train gave 40 samples per epoch, now 9 \(its choose",
        ),
    ],
)
def test_a_changed_plan_is_refused_with_the_reason(config: RecipeConfig, encoder: Encoder, change, named, steps: int):
    loader = open_loader(config, encoder)
    iterator = iter(loader)
    seen = sum(get_num_packs_in_batch(next(iterator)) for _ in range(steps))
    state = dataset_of(loader).state_dict(seen, True)
    with pytest.raises(ValueError, match=f"cannot resume: .*{named}.*load_weights_only"):
        dataset_of(open_loader(change(config), encoder)).load_state_dict(state)


def with_loader(config: RecipeConfig, **changes: Any) -> RecipeConfig:
    return replace(config, train_loader=replace(config.train_loader, **changes))


def test_other_data_and_another_prompt_are_refused(config: RecipeConfig, encoder: Encoder, data):
    state = dataset_of(open_loader(config, encoder)).state_dict(0, True)
    other = with_loader(config, streams={"train": data["other"]})
    with pytest.raises(ValueError, match=r"streams.train had other samples \(\d+, now 12\).*; lengths \(tok") as raised:
        dataset_of(open_loader(other, encoder)).load_state_dict(state)
    assert not re.search("[0-9a-f]{16}", str(raised.value)), "a fingerprint says nothing"
    renamed = with_loader(config, streams={"others": data["other"]})
    with pytest.raises(ValueError, match=r"streams.train is missing, train_loader.streams.others is new"):
        dataset_of(open_loader(renamed, encoder)).load_state_dict(state)
    older = {key: value for key, value in state.items() if key != "streams"}
    with pytest.raises(ValueError, match=r"\(train_loader.streams hold other samples"):
        dataset_of(open_loader(other, encoder)).load_state_dict(older)
    with pytest.raises(ValueError, match=r"changed since the checkpoint \(lengths \(tokenizer, prompt, pixel budget\)"):
        prompted = replace(encoder, prompt=PromptConfig(detect="Find all."))
        dataset_of(open_loader(config, prompted)).load_state_dict(state)


def test_a_plan_that_other_code_makes_is_refused(config: RecipeConfig, encoder: Encoder, monkeypatch):
    loader = open_loader(config, encoder)
    next(iter(loader))
    state = dataset_of(loader).state_dict(BATCH_SIZE, True)
    monkeypatch.setattr("recipe.data.stream._digest", lambda value: f"{hash(repr(value)):016x}"[:12])
    monkeypatch.setattr("recipe.data.plan._PURPOSE", 9)
    fresh = dataset_of(open_loader(config, encoder))
    state["plan"] = {**fresh.identity(), "digest": state["plan"]["digest"]}
    with pytest.raises(ValueError, match="has another version"):
        fresh.load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_that_an_earlier_version_began_keeps_its_plan(
    config: RecipeConfig, encoder: Encoder, monkeypatch, num_workers: int
):
    loader = open_loader(config, encoder)
    first = content(loader)  # of one chunk, as earlier versions planned all sets
    earlier = [dataset_of(loader).plan(epoch).digest() for epoch in (0, 1)]
    loader = open_loader(config, encoder)
    next(iter(loader))
    state = dataset_of(loader).state_dict(BATCH_SIZE, True)
    monkeypatch.setattr("recipe.data.plan.WINDOWS_PER_CHUNK", 1)
    monkeypatch.setattr("recipe.data.plan._code_digest", lambda: "later version")
    fresh = open_loader(config, encoder)
    assert [dataset_of(fresh).plan(epoch).digest() for epoch in (0, 1)] != earlier
    second = [content(fresh) for _ in range(2)][1]
    resumed = open_loader(config, encoder, num_workers=num_workers)
    dataset_of(resumed).load_state_dict(state)
    assert len(resumed) == len(first)
    assert dataset_of(resumed).state_dict(2 * BATCH_SIZE, True)["plan"]["digest"] == earlier[0]
    assert content(resumed) == first[1:]
    assert content(resumed) == second, "later epochs have the new plan"


def test_repeated_samples_are_shown_other_teachers_and_noise(config: RecipeConfig, encoder: Encoder, data):
    config.train_loader.streams = {
        "train": {**data["train"], "repeat": 2.5},
        "other": {**data["other"], "choose": 5},
    }
    config.teachers.teacher_ratio = 1.0
    batches = list(open_loader(config, encoder))
    counts = Counter(ids_of(content(batches)))
    assert sum(count for name, count in counts.items() if int(name.split("-")[1]) >= 200) == 5
    assert counts.total() == 105
    assert set(counts.values()) <= {1, 2, 3}
    pictures = [(name, tokens) for step in content(batches) for name, tokens in step if name.startswith("sample")]
    repeated = [name for name, count in counts.items() if count == 2 and name.startswith("sample")]
    shown = [{tokens for name, tokens in pictures if name == wanted} for wanted in repeated]
    assert sum(len(tokens) == 2 for tokens in shown) > len(shown) / 2
    noise = [seed for batch in batches for item in batch for seed in item["noise_seeds"]]
    assert len(set(noise)) == len(noise)


@pytest.mark.parametrize("resampling", [{}, {"repeat": 2.5}, {"choose": 5}])
def test_samples_of_an_epoch_are_streamings(config: RecipeConfig, encoder: Encoder, data, resampling: dict[str, float]):
    config.train_loader.streams = {"train": data["train"], "other": {**data["other"], **resampling}}
    dataset = dataset_of(open_loader(config, encoder))
    for epoch in range(2):
        units, samples = dataset.epoch_samples(epoch)
        expected_units, expected = dataset.resample_streams(epoch)
        assert units.tolist() == expected_units.tolist()
        assert (samples is None) == (not resampling)
        assert (np.arange(dataset.num_samples) if samples is None else samples).tolist() == expected.tolist()


def test_proportions_of_streams_hold(config: RecipeConfig, encoder: Encoder, data):
    config.train_loader.streams = {
        "train": {**data["train"], "proportion": 0.25},
        "other": {**data["other"], "proportion": 0.75},
    }
    config.train_loader.dataset = {"shuffle": True, "epoch_size": 60}
    names = ids_of(content(open_loader(config, encoder)))
    assert len(names) == 60
    assert sum(int(name.split("-")[1]) >= 200 for name in names) == 45


def test_a_sample_over_the_budget_is_named_or_left_out(config: RecipeConfig, encoder: Encoder):
    config.train_loader.packing = PackingConfig(max_tokens=MAX_TOKENS, max_patches=80)
    with pytest.raises(
        ValueError, match=r"\d+ samples can be over 400 tokens .* and 80 .*'sample-.*longest teachers.*max_patches"
    ):
        len(open_loader(config, encoder))
    config.train_loader.packing.on_long_sample = "skip"
    loader = open_loader(config, encoder)
    steps = content(loader)
    dataset = dataset_of(loader)
    left_out = dataset.plan(0).left_out.tolist()
    assert sorted([*ids_of(steps), *(dataset[i]["id"] for i in left_out)]) == sorted(
        dataset[i]["id"] for i in range(NUM_SAMPLES)
    )
    assert 0 < len(left_out) < NUM_SAMPLES
    assert min(len(dataset.example(i).pixel_patches) for i in left_out) > 40


def test_what_a_later_epoch_could_draw_is_refused_at_the_start(config: RecipeConfig, encoder: Encoder):
    config.train_loader.packing = PackingConfig(max_tokens=MAX_TOKENS, on_long_sample="skip")
    dataset = dataset_of(open_loader(config, encoder))
    assert dataset._packing is not None
    lengths = dataset._packing.lengths
    first, longest = (
        int(tokens.max()) for tokens in (lengths.of_epoch(0, np.arange(NUM_SAMPLES))[0], lengths.longest()[0])
    )
    assert first < longest  # else the first epoch would tell
    config.train_loader.packing = PackingConfig(max_tokens=first)
    with pytest.raises(ValueError, match=rf"can be over .*{first} tokens .*with {longest} tokens"):
        open_loader(config, encoder)
    config.train_loader.packing = PackingConfig(max_tokens=longest)
    assert sorted(ids_of(content(open_loader(config, encoder))))


def test_one_sample_is_held_to_max_seq_len_whatever_a_pack_may_hold(config: RecipeConfig, encoder: Encoder):
    config.max_seq_len = 150
    encoder = replace(encoder, max_seq_len=150)
    with pytest.raises(ValueError, match="400 tokens per pack, 150 per sample"):
        open_loader(config, encoder)
    config.train_loader.packing = PackingConfig(max_tokens=MAX_TOKENS, on_long_sample="skip")
    loader = open_loader(config, encoder)
    left_out = dataset_of(loader).plan(0).left_out
    assert 0 < len(left_out) == NUM_SAMPLES - len(ids_of(content(loader)))


def test_nothing_left_to_train_on_is_refused(config: RecipeConfig, encoder: Encoder):
    config.train_loader.packing = PackingConfig(max_tokens=10, on_long_sample="skip")
    with pytest.raises(ValueError, match=r"all \d+ samples of epoch 0 are over the budget of a pack: raise"):
        len(open_loader(config, encoder))


def test_a_broken_teacher_is_named_at_the_start(config: RecipeConfig, tmp_path: Path, make_sample, write_shards):
    pool = [make_sample(100), make_sample(101), replace(make_sample(102), image=b"no picture")]
    config.teachers.stream = write_shards(tmp_path / "pool", pool)
    with pytest.raises(ValueError, match=r"teacher 'sample-102' of the pool: cannot decode .* choose the pool again"):
        read_teachers(config.teachers, config.seed)


def test_lengths_that_lie_are_found_out(config: RecipeConfig, encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    loader = open_loader(config, encoder)
    plan = dataset_of(loader).plan(0)
    monkeypatch.setattr(loader.dataset, "plan", lambda epoch: replace(plan, tokens=plan.tokens + 1))
    with pytest.raises(RuntimeError, match=r"is \d+ tokens long, but \d+ were planned.*convert the data set again"):
        list(loader)


def test_tokens_of_a_batch_are_those_of_the_first_epochs_packs(config: RecipeConfig, encoder: Encoder):
    config.optimizer.lr_scaling = "linear"
    spec = build_train_loader(
        config.train_loader, encoder, read_teachers(config.teachers, config.seed), config.seed, 1, split_batch
    )
    dataset = dataset_of(spec.dataloader)  # pyright: ignore[reportArgumentType]
    lengths = [item["num_tokens"] for batch in spec.dataloader for item in batch]
    assert tokens_per_batch(config.train_loader, spec) == pytest.approx(BATCH_SIZE * sum(lengths) / len(lengths))
    assert dataset.plan(0).num_packs == len(lengths)


def test_downloads_run_ahead_by_samples_not_packs(config: RecipeConfig, encoder: Encoder):
    dataset = dataset_of(open_loader(config, encoder))
    samples_of_a_batch = BATCH_SIZE * NUM_SAMPLES / dataset.plan(0).num_packs
    assert dataset.predownload is not None and dataset.predownload >= max(64, 4 * samples_of_a_batch)
    config.train_loader.dataset = {"predownload": 7}
    assert dataset_of(open_loader(config, encoder)).predownload == 7


@pytest.fixture
def with_bad_pictures(tmp_path: Path, config: RecipeConfig, make_sample, write_shards) -> RecipeConfig:
    """Samples 0, 1 and 7 cannot be decoded; a pack holds one or two samples."""
    samples = [
        make_sample(number, 1, **({"image": b"no picture"} if number in (0, 1, 7) else {})) for number in range(9)
    ]
    config.teachers = TeacherConfig()
    packing = PackingConfig(max_tokens=250)
    return with_loader(config, streams={"train": write_shards(tmp_path / "bad", samples)}, packing=packing)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_stops_the_run_and_is_named(with_bad_pictures: RecipeConfig, encoder: Encoder, num_workers: int):
    with pytest.raises(ValueError, match=r"sample 'sample-\d': cannot decode"):
        list(open_loader(with_bad_pictures, encoder, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_bad_samples_are_skipped_and_told(
    with_bad_pictures: RecipeConfig, encoder: Encoder, num_workers: int, packed: bool
):
    config = with_loader(with_bad_pictures, on_bad_sample="skip")
    if not packed:
        config.train_loader.packing = None
    loader = open_loader(config, encoder, num_workers=num_workers)
    batches = list(loader)
    microbatches = [item for batch in batches for item in batch]
    skipped = {name: reason for item in microbatches for name, reason in item["skipped"].items()}
    assert sorted(skipped) == ["sample-0", "sample-1", "sample-7"]
    assert all("cannot decode" in reason for reason in skipped.values())
    assert sum(item["num_samples"] for item in microbatches) == 6
    # A pack of nothing but bad samples still counts: the position in the epoch goes on.
    assert sum(item["num_packs"] for item in microbatches) == dataset_of(loader).plan(0).num_packs
    assert all(len(item["samples"]) for item in microbatches)


def test_no_good_sample_at_all_is_refused(
    tmp_path: Path, config: RecipeConfig, encoder: Encoder, make_sample, write_shards
):
    stream = write_shards(tmp_path / "bad", [make_sample(0, 1, image=b"no picture")])
    config = with_loader(config, streams={"train": stream}, on_bad_sample="skip")
    with pytest.raises(ValueError, match="no sample of the data set can be used"):
        list(open_loader(config, encoder))
