"""Answers are read while the trunk learns: lengths, plans, the epoch they change in, resumption inside either kind."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.models import ComposerModel
from torch.utils.data import DataLoader

from recipe.build import answer_schedule
from recipe.callbacks.training_data import TrainingData
from recipe.config import (
    LoaderConfig,
    OptimizerConfig,
    PackingConfig,
    PromptConfig,
    RecipeConfig,
    StagedFreezingConfig,
    TeacherConfig,
)
from recipe.data.encode import Encoder
from recipe.data.lengths import LengthTable, count_lengths, count_teachers
from recipe.data.loader import build_train_loader, get_num_packs_in_batch, tokens_per_batch
from recipe.data.maker import ExampleMaker
from recipe.data.stream import PackStream
from recipe.data.teachers import TeacherPool
from recipe.losses.counts import split_batch
from recipe.schema import Batch, Role, Sample
from tests.data.conftest import MakeSample

NUM_SAMPLES = 24
MAX_TOKENS = 260
CHAT = (
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "a red star"},
    {"role": "user", "content": "and its colour?"},
    {"role": "assistant", "content": "red"},
)
FROZEN_FIRST = [{"from": "0ep", "lr": "frozen"}, {"from": "1ep", "lr": 1.0}]


@pytest.fixture(scope="module")
def samples(make_sample: MakeSample) -> list[Sample]:
    found = [make_sample(number, number % 4, 28 + 4 * number, 60) for number in range(NUM_SAMPLES - 2)]
    return [*found, Sample("text", b"", 0, 0, None, CHAT), make_sample(99, 2, messages=CHAT)]


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample], write_shards) -> LoaderConfig:
    return LoaderConfig(
        streams={"train": write_shards(tmp_path_factory.mktemp("answers"), samples)},
        global_batch_size=2,
        collator="packed",
        packing=PackingConfig(max_tokens=MAX_TOKENS, window=16),
        dataset={"shuffle": True, "num_canonical_nodes": 1},
    )


def open_stream(loader: LoaderConfig, encoder: Encoder, with_answers: bool, **dataloader: Any) -> DataLoader:
    loader = replace(loader, dataloader=dataloader)
    spec = build_train_loader(loader, encoder, None, 3, 1, split_batch, answers_at_start=with_answers)
    assert isinstance(spec.dataloader, DataLoader) and isinstance(spec.dataloader.dataset, PackStream)
    return spec.dataloader


def content(batches: Any) -> list[list[tuple[str, int]]]:
    """Of each step: the id and length of its samples."""
    return [
        [pair for item in batch for pair in zip((s.id for s in item["samples"]), item["segment_lengths"], strict=True)]
        for batch in batches
    ]


def test_without_its_answer_a_conversation_ends_with_its_prompt(encoder: Encoder, samples: list[Sample], make_sample):
    teacher = make_sample(50, 1)
    for sample in samples:
        shown = [teacher] if sample.messages is None else []
        whole, bare = encoder(sample, shown), encoder(sample, shown, with_answers=False)
        assert torch.equal(bare.input_ids, whole.input_ids[: whole.prompt_length])
        assert torch.equal(bare.position_ids, whole.position_ids[:, : whole.prompt_length])
        assert bare.prompt_length == len(bare.input_ids) == whole.prompt_length < len(whole.input_ids)
        assert bool((whole.roles == Role.STUDENT).any()) and not bare.roles.any()
        assert bool((whole.roles == Role.TEACHER).any()) == bool(shown)
        assert [target is None for target in bare.targets] == [target is None for target in whole.targets]


def test_only_false_leaves_the_answer_out_where_the_trunk_learns(encoder: Encoder, make_sample):
    sample = make_sample(0, 2)
    lengths = {
        choice: len(replace(encoder, prompt=PromptConfig(student_answer=choice))(sample).input_ids)
        for choice in (None, True, False)
    }
    assert lengths[None] == lengths[True] > lengths[False] == encoder(sample).prompt_length


def test_lengths_of_both_kinds_are_those_of_the_encoded_samples(encoder: Encoder, samples: list[Sample], make_sample):
    pool = TeacherPool([make_sample(50 + n, n) for n in range(3)], TeacherConfig(num_teachers=1, teacher_ratio=0.5), 3)
    lengths = count_lengths([replace(sample, image=b"") for sample in samples], encoder)
    table = LengthTable(lengths, pool, *count_teachers(pool, encoder))
    maker, positions = ExampleMaker(encoder, pool, seed=3), list(range(len(samples)))
    for with_answers in (True, False):
        tokens, _ = table.of_epoch(1, torch.tensor(positions).numpy(), 0, with_answers)
        examples = [maker(samples[n].to_mds(), 1, n, with_answers) for n in positions]
        assert tokens.tolist() == [len(example.input_ids) for example in examples]
    assert (table.longest()[0] - table.longest(with_answers=False)[0]).tolist() == lengths.answer_tokens.tolist()
    assert lengths.answer_tokens.min() > 0


def test_packs_without_answers_hold_every_sample_once_and_more_of_them(loader: LoaderConfig, encoder: Encoder):
    counts = {}
    for with_answers in (True, False):
        steps = content(open_stream(loader, encoder, with_answers))
        assert content(open_stream(loader, encoder, with_answers, num_workers=2)) == steps
        assert len({name for step in steps for name, _ in step}) == NUM_SAMPLES
        counts[with_answers] = len(steps), sum(tokens for step in steps for _, tokens in step)
    assert counts[False] < counts[True]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("with_answers", [True, False])
def test_resumes_inside_either_kind_of_epoch(
    loader: LoaderConfig, encoder: Encoder, with_answers: bool, num_workers: int
):
    expected = content(open_stream(loader, encoder, with_answers))
    whole = open_stream(loader, encoder, with_answers, num_workers=num_workers)
    iterator, dataset = iter(whole), whole.dataset
    assert isinstance(dataset, PackStream)
    seen = sum(get_num_packs_in_batch(next(iterator)) for _ in range(2))
    state = dataset.state_dict(seen, True)
    del iterator

    resumed = open_stream(loader, encoder, not with_answers, num_workers=2 - num_workers)
    assert isinstance(resumed.dataset, PackStream)
    before = tokens_per_batch(loader, SpecOf(resumed))  # pyright: ignore[reportArgumentType]
    resumed.dataset.check_plan(state)
    assert tokens_per_batch(loader, SpecOf(resumed)) == before  # pyright: ignore[reportArgumentType]
    resumed.dataset.load_state_dict(state)
    assert content(resumed) == expected[2:]


class SpecOf:
    """What `tokens_per_batch` reads of a DataSpec."""

    def __init__(self, dataloader: DataLoader):
        self.dataloader = dataloader


def test_a_checkpoint_that_says_nothing_has_answers(loader: LoaderConfig, encoder: Encoder):
    older, resumed = open_stream(loader, encoder, with_answers=True), open_stream(loader, encoder, with_answers=False)
    assert isinstance(older.dataset, PackStream) and isinstance(resumed.dataset, PackStream)
    steps = content(older)
    state = older.dataset.state_dict(2, True)
    del state["with_answers"]
    resumed.dataset.load_state_dict(state)
    assert content(resumed) == steps[1:]


def test_an_answer_that_is_never_read_may_be_too_long(loader: LoaderConfig, encoder: Encoder, samples: list[Sample]):
    longest = max(len(encoder(sample, with_answers=False).input_ids) for sample in samples)
    loader = replace(loader, packing=PackingConfig(max_tokens=longest))
    arguments = (loader, replace(encoder, max_seq_len=longest), None, 3, 1, split_batch)
    build_train_loader(*arguments, answers_at_start=False, answers_ever=False)
    with pytest.raises(ValueError, match=f"samples can be over {longest} tokens per pack"):
        build_train_loader(*arguments, answers_at_start=False)


class Reader(ComposerModel):
    """Notes of each step whether its conversations hold answers."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Batch] = []

    def forward(self, batch: Batch) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight.sum()

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return outputs


def train(
    loader: LoaderConfig, encoder: Encoder, folder: Path, stages: list[dict[str, Any]] | None, **changes: Any
) -> list[tuple[int, bool, list[str]]]:
    """Epoch, whether answers are read, and ids of each pack, if the language model has the stages; None: rate 0."""
    optimizer = OptimizerConfig(lr_vision=0, lr_merger=0, lr_llm=0 if stages is None else 1)
    staged = StagedFreezingConfig({"llm": stages} if stages else {})
    schedule = answer_schedule(RecipeConfig(optimizer=optimizer, staged_freezing=staged))
    model, max_duration = Reader(), changes.pop("max_duration", "3ep")
    spec = build_train_loader(loader, encoder, None, 3, 1, split_batch, answers_at_start=True)
    epochs: list[int] = []
    model.register_forward_pre_hook(lambda *_: epochs.append(int(trainer.state.timestamp.epoch)))
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration=max_duration,
        device="cpu",
        device_train_microbatch_size=1,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        callbacks=[TrainingData(MAX_TOKENS, 0, folder, num_queries=9, schedule=schedule)],
        **changes,
    )
    trainer.fit()
    trainer.close()
    return [
        (epoch, bool(len(batch["labels"])), [sample.id for sample in batch["samples"]])
        for epoch, batch in zip(epochs, model.seen, strict=True)
        if batch["num_packs"]
    ]


def kinds(steps: list[tuple[int, bool, list[str]]]) -> dict[int, set[bool]]:
    """Of each epoch, whether its packs hold answers."""
    return {epoch: {with_answers for other, with_answers, _ in steps if other == epoch} for epoch, _, _ in steps}


YES, NO = {True}, {False}


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (None, {0: NO, 1: NO, 2: NO}),
        ([], {0: YES, 1: YES, 2: YES}),
        (FROZEN_FIRST, {0: NO, 1: YES, 2: YES}),
        ([{"from": "0ba", "lr": "frozen"}, {"from": "1ba", "lr": 1.0}], {0: NO, 1: YES, 2: YES}),
        ([{"from": "1ba", "lr": "frozen"}], {0: YES, 1: NO, 2: NO}),
        ([{"from": "0dur", "lr": "frozen"}, {"from": "0.35dur", "lr": 1.0}], {0: NO, 1: NO, 2: YES}),
        ([{"from": "0dur", "lr": "frozen"}, {"from": "0.7dur", "lr": 1.0}], {0: NO, 1: NO, 2: YES}),  # the last epoch
        ([{"from": "0sp", "lr": "frozen"}, {"from": "3sp", "lr": 0.0}], {0: NO, 1: YES, 2: YES}),
    ],
)
def test_the_stage_at_an_epochs_first_batch_decides(
    loader: LoaderConfig, encoder: Encoder, tmp_path: Path, stages: Any, expected: dict[int, set[bool]]
):
    steps = train(loader, encoder, tmp_path, stages)
    assert kinds(steps) == expected
    for epoch in range(3):
        assert sum(len(ids) for other, _, ids in steps if other == epoch) == NUM_SAMPLES


@pytest.mark.parametrize(("duration", "expected"), [("2ba", YES), ("2sp", YES), ("300tok", YES), ("1ep", YES)])
def test_a_stage_within_the_last_epoch_finds_answers(
    loader: LoaderConfig, encoder: Encoder, tmp_path: Path, duration: str, expected: set[bool]
):
    stages = [{"from": "0dur", "lr": "frozen"}, {"from": "0.5dur", "lr": 1.0}]
    assert kinds(train(loader, encoder, tmp_path, stages, max_duration=duration)) == {0: expected}


@pytest.mark.parametrize("workers", [{"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_workers_follow(loader: LoaderConfig, encoder: Encoder, tmp_path: Path, workers: dict[str, Any]):
    alone = train(loader, encoder, tmp_path, FROZEN_FIRST)
    assert train(replace(loader, dataloader=workers), encoder, tmp_path, FROZEN_FIRST) == alone


@pytest.mark.parametrize("last", [1, 3, 6])  # within the epoch without answers, and those with
def test_a_run_resumes_inside_either_kind_of_epoch(loader: LoaderConfig, encoder: Encoder, tmp_path: Path, last: int):
    whole = train(loader, encoder, tmp_path, FROZEN_FIRST, max_duration="3ep")
    saving = {"save_folder": str(tmp_path / "saved"), "save_interval": "1ba", "save_filename": "ba{batch}.pt"}
    first = train(loader, encoder, tmp_path, FROZEN_FIRST, max_duration="3ep", **saving)
    assert first == whole
    resumed = train(loader, encoder, tmp_path, FROZEN_FIRST, load_path=str(tmp_path / "saved" / f"ba{last}.pt"))
    assert 0 < len(resumed) < len(whole) and resumed == whole[-len(resumed) :]


def test_a_run_says_once_when_answers_come_and_go(
    loader: LoaderConfig, encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def said(stages: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="recipe"):
            train(loader, encoder, tmp_path, stages)
        return [record.getMessage() for record in caplog.records if "answers" in record.getMessage()]

    out = "from epoch %d on training leaves answers out, as the trunk is frozen; evaluation reads them "
    out += "(prompt.student_answer)"
    back = "from epoch %d on training reads answers: the trunk learns from them"
    assert said([]) == []
    assert said(None) == [out % 0]
    assert said(FROZEN_FIRST) == [out % 0, back % 1]
    assert said([{"from": "2ep", "lr": "frozen"}]) == [out % 2]
    first, warning, second = said([{"from": "0ba", "lr": "frozen"}, {"from": "1ba", "lr": 1.0}])
    assert (first, second) == (out % 0, back % 1)
    assert warning.startswith("the trunk learns from batch 1 on, but answers are read from epoch 1 on")


def test_true_keeps_answers_in_every_epoch(tiny_config: Callable[..., Any]):
    rates = {"lr_vision": 0, "lr_merger": 0, "lr_llm": 0}
    for choice, is_kept in ((None, False), (True, True), (False, False)):
        schedule = answer_schedule(tiny_config(optimizer=rates, prompt={"student_answer": choice}))
        assert (schedule is None) == is_kept
