"""The lengths of augmented samples are planned before any image is read, and are those of the encoded samples."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipe.callbacks.samples import LogFirstSample, first_images
from recipe.config import (
    AugmentConfig,
    ConfigError,
    CropConfig,
    ImageConfig,
    LoaderConfig,
    PackingConfig,
    PromptConfig,
    TeacherConfig,
)
from recipe.data.augment import Augmentation
from recipe.data.drawn_lengths import DrawnTable, JoinedNumbersError, Pieces, with_draws
from recipe.data.encode import Encoder
from recipe.data.image import image_spec
from recipe.data.lengths import LengthTable, check_records, count_lengths, count_teachers
from recipe.data.loader import build_train_loader
from recipe.data.maker import ExampleMaker
from recipe.data.stream import PackStream
from recipe.data.teachers import TeacherPool
from recipe.losses.counts import split_batch
from recipe.schema import Object, Sample
from recipe.upstream.checked_stream import CheckedStream
from recipe.upstream.storage import open_streams

EVERYTHING = AugmentConfig(horizontal_flip=0.5, crop=CropConfig(probability=0.8), scale_jitter=[0.5, 2.0])
FIRST_EPOCHS = replace(EVERYTHING, crop=CropConfig(probability=1.0, epochs=7), scale_jitter=None)
NATIVE = AugmentConfig(crop=CropConfig(probability=1.0, scale=[0.05, 0.5], ratio=[0.3, 3.0], enlarge=False))
SAYS = "on the left of the large blue circle"
FLIPPED = ["red star", "clockwise", "what?", SAYS, "white-knight", "ü (x)", "leftmost"]
CAPTIONS = ["red star", "bus 42", 'a "b" ', "左边的狗", "]}, {[", "what?", "the right answer"]


def box_part(*box: float) -> dict[str, Any]:
    return {"type": "box", "box": list(box)}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def samples(make_sample) -> list[Sample]:
    """Images of many sizes with 0 to 6 objects, some with sides in their captions, and chats of every kind."""
    pictures = [make_sample(number, number % 7, 60 + 37 * number, 50 + 29 * (number % 4)) for number in range(12)]
    for number, picture in enumerate(pictures):
        words = CAPTIONS if number % 3 == 0 else FLIPPED
        objects = picture.objects or ()
        named = tuple(replace(item, caption=words[(number + i) % 7]) for i, item in enumerate(objects))
        pictures[number] = replace(picture, objects=named)
    pictures[4] = replace(pictures[4], objects=(*(pictures[4].objects or ()), Object((0, 0, 9, 9), "", True)))
    pictures[5] = replace(pictures[5], objects=(Object((3.5, 4.25, 60.5, 80), "", True),))
    pictures[6] = replace(pictures[6], objects=None)
    chat = (
        {"role": "user", "content": [text_part("is it "), box_part(10.2, 20, 50, 60), text_part("?")]},
        {"role": "assistant", "content": [text_part("no, "), box_part(30, 5, 90.7, 70), text_part(" is")]},
        {"role": "user", "content": "and this?"},
        {"role": "assistant", "content": "a star"},
    )
    pictures[8] = replace(pictures[8], messages=chat)
    plain = ({"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "blue"})
    pictures[9] = replace(pictures[9], objects=None, messages=plain)
    return [*pictures, Sample("text", b"", 0, 0, None, plain[1:] and ({"role": "user", "content": "hello"}, plain[1]))]


@pytest.fixture
def streams(tmp_path: Path, samples: list[Sample], write_shards) -> list[CheckedStream]:
    return open_streams(
        {"a": write_shards(tmp_path / "a", samples[:7]), "b": write_shards(tmp_path / "b", samples[7:])}
    )


def table_of(
    samples: Sequence[Sample], streams: list[CheckedStream], encoder: Encoder, config: AugmentConfig, pool=None
) -> DrawnTable:
    lengths = count_lengths([replace(sample, image=b"") for sample in samples], encoder)
    none = np.empty(0, dtype=np.int64)
    added = (none, none) if pool is None else count_teachers(pool, encoder)
    return with_draws(
        LengthTable(lengths, pool, *added), streams, encoder, Augmentation.of(config, encoder.image_spec, 3)
    )


@pytest.mark.parametrize(
    ("config", "box_coordinates", "limits"),
    [
        (EVERYTHING, "absolute", ImageConfig(max_pixels=90000)),
        (EVERYTHING, "normalized_1000", ImageConfig(min_pixels=784, max_pixels=40000)),
        (NATIVE, "absolute", ImageConfig(min_pixels=784, max_pixels=20000)),
        (AugmentConfig(horizontal_flip=0.5), "absolute", ImageConfig(min_pixels=784)),
        (replace(EVERYTHING, teachers=True), "absolute", ImageConfig(min_pixels=784, max_pixels=40000)),
        (replace(FIRST_EPOCHS, teachers=True), "absolute", ImageConfig(min_pixels=784, max_pixels=40000)),
    ],
)
@pytest.mark.parametrize("with_answers", [True, False])
def test_planned_lengths_are_those_of_the_encoded_samples(
    encoder: Encoder,
    processor,
    samples: list[Sample],
    streams: list[CheckedStream],
    make_sample,
    config: AugmentConfig,
    box_coordinates: str,
    limits: ImageConfig,
    with_answers: bool,
):
    encoder = replace(
        encoder,
        prompt=PromptConfig(box_coordinates=box_coordinates),
        image_spec=image_spec(processor.image_processor, limits),
        max_seq_len=100000,
    )
    pool = TeacherPool(
        [samples[0], samples[1], *(make_sample(50 + n, n, 60 + 40 * n) for n in range(3))],
        TeacherConfig(num_teachers=2, teacher_ratio=0.5),
        3,
    )
    table = table_of(samples, streams, encoder, config, pool)
    maker = ExampleMaker(encoder, pool, 3, table.augmentation)
    repeated = np.array([*range(len(samples))] * 5)
    longest, most = table.longest(with_answers)
    seen = set()
    crop = config.crop
    for epoch, crops in ((0, crop is not None), (7, crop is not None and crop.epochs is None)):
        looks = set()
        tokens, patches = table.of_epoch(epoch, repeated, 0, with_answers)
        some, _ = table.of_epoch(epoch, repeated[20:23], 20, with_answers)
        assert some.tolist() == tokens[20:23].tolist()
        for occurrence, position in enumerate(repeated.tolist()):
            example = maker(samples[position].to_mds(), epoch, occurrence, with_answers)
            assert len(example.input_ids) == tokens[occurrence], (samples[position].id, example.drawn)
            assert len(example.pixel_patches) == patches[occurrence], (samples[position].id, example.drawn)
            looks.add((position, example.drawn))
        assert (tokens <= longest[repeated]).all() and (patches <= most[repeated]).all()
        assert any("part" in look for _, look in looks) == crops
        seen |= looks
    assert len(seen) > 16
    sides = {n for n, sample in enumerate(samples) for item in sample.objects or () if item.caption == "clockwise"}
    assert any("flipped" in look for position, look in seen if position in sides) or not config.horizontal_flip


def tokenizer_like(encoder: Encoder, split: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts texts as `split` does (None: nowhere), with merges of digits and what is around them."""
    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is not None)
    tokenizer.pre_tokenizer = to_bytes  # pyright: ignore[reportAttributeAccessIssue]
    numbers = " ".join(f'[{{"bbox_2d": [{n}, {n * 7 % 400}, {n * 3 % 400}, {n + 1}], "label"' for n in range(400))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = 'a "label": "what?"}, {"bbox_2d": [1, 2], "label": "red star"}] '
    tokenizer.train_from_iterator(
        [numbers, *[words] * 400], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet)
    )
    special = {name: getattr(encoder.tokenizer, name) for name in ("eos_token", "pad_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<|image_pad|>", "<|im_start|>"], **special
    )


def test_numbers_of_several_digits_per_token_are_planned(
    encoder: Encoder, samples: list[Sample], streams: list[CheckedStream]
):
    """GPT-2 cuts before a number and the space in front of it, and has tokens of two and three digits."""
    tokenizer = tokenizer_like(encoder, "GPT-2")
    assert len(tokenizer.tokenize("[12, 345]")) < 9
    other = replace(encoder, tokenizer=tokenizer, max_seq_len=100000)
    table = table_of(samples, streams, other, EVERYTHING)
    (inner, last), (other_inner, other_last) = table.pieces.of_words(["what?", "red star"])
    assert last - inner != other_last - other_inner  # so it matters which object an answer lists last
    places = [*range(len(samples))] * 6
    tokens, patches = table.of_epoch(2, np.array(places))
    for occurrence, position in enumerate(places):
        sample = samples[position]
        shown, _, _ = table.augmentation.show(sample, [], 2, occurrence)
        head, student = other.segments(shown)
        texts = sum(len(row) for row in other.ids([segment.text for segment in [*head, *student]]))
        images = patches[occurrence] // 4 - 1 if sample.has_image else 0
        assert tokens[occurrence] == texts + images, sample.id


def test_a_tokenizer_that_joins_numbers_with_brackets_is_refused(
    encoder: Encoder, samples: list[Sample], streams: list[CheckedStream], caplog: pytest.LogCaptureFixture
):
    other = replace(encoder, tokenizer=tokenizer_like(encoder, None), max_caption_tokens=100)
    with pytest.raises(JoinedNumbersError, match=r"joins the numbers.*train_loader\.packing=null or train_loader\.aug"):
        table_of(samples, streams, other, EVERYTHING)

    def draws(table: LengthTable, own: Sequence[CheckedStream]) -> LengthTable:
        return with_draws(table, own, other, Augmentation.of(EVERYTHING, other.image_spec, 3))

    check_records("train_loader", streams, other, None, LoaderConfig(), draws=draws)
    assert "captions and lengths are not judged before training: train_loader.augment with this" in caplog.text


def test_a_piece_of_an_answer_worked_by_hand(encoder: Encoder):
    pieces = Pieces(encoder)
    answer = '[{"bbox_2d": [1, 20, 300, 4000], "label": "red"}, {"bbox_2d": [5, 6, 7, 8], "label": "blue"}]<|im_end|>'
    numbers = np.array([[1, 20, 300, 4000], [5, 6, 7, 8]])
    (red, _), (_, blue) = pieces.of_words(["red", "blue"])
    # Each digit is a token, and so is the space before a number.
    assert pieces.of_numbers(numbers).tolist() == [1 + 3 + 4 + 5, 1 + 2 + 2 + 2]
    newline = 1
    assert pieces.list + 13 + 7 + red + blue == len(encoder.ids([answer])[0]) + newline
    assert pieces.empty_list == len(encoder.ids(["[]<|im_end|>"])[0]) + newline


def test_the_largest_that_can_be_drawn_decides_what_is_too_long(
    encoder: Encoder, samples: list[Sample], streams: list[CheckedStream]
):
    """Bounds are near what is drawn, so that few samples are refused in vain."""
    own = replace(encoder, image_spec=replace(encoder.image_spec, max_pixels=300000), max_seq_len=100000)
    config = AugmentConfig(horizontal_flip=0.5, scale_jitter=[1.0, 1.5])
    table = table_of(samples, streams, own, config)
    drawn = np.stack([table.of_epoch(epoch, np.arange(len(samples)))[0] for epoch in range(300)])
    tokens, _ = table.longest()
    assert (drawn <= tokens).all()
    # measured: 1.30, of the smallest image, and 1.11
    assert (tokens / drawn.max(axis=0)).max() < 1.4 and np.median(tokens / drawn.max(axis=0)) < 1.2
    limit = int(tokens.max()) - 1

    def draws(table: LengthTable, some: Sequence[CheckedStream]) -> LengthTable:
        return with_draws(table, some, own, Augmentation.of(config, own.image_spec, 3))

    short = replace(own, max_seq_len=limit)
    check_records("train_loader", streams, short, None, LoaderConfig())
    with pytest.raises(ConfigError, match=rf"1 of \d samples .* a conversation above {limit} tokens"):
        check_records("train_loader", streams, short, None, LoaderConfig(), draws=draws)


@pytest.fixture
def loader(tmp_path: Path, make_sample, write_shards) -> LoaderConfig:
    pictures = [make_sample(number, number % 4, 28 + 9 * number, 60) for number in range(30)]
    named = [replace(p, objects=tuple(replace(o, caption="red star") for o in p.objects or ())) for p in pictures]
    return LoaderConfig(
        streams={"train": write_shards(tmp_path / "train", named)},
        global_batch_size=2,
        collator="packed",
        packing=PackingConfig(max_tokens=600, window=16),
        augment=EVERYTHING,
        dataset={"shuffle": True},
    )


def open_packs(loader: LoaderConfig, encoder: Encoder) -> tuple[Any, PackStream]:
    spec = build_train_loader(loader, encoder, None, 3, 1, split_batch)
    dataloader: Any = spec.dataloader
    return dataloader, dataloader.dataset


def content(batches: Any) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    """Of each step: of each sample its id, how it is shown and its tokens."""
    return [
        [
            (sample.id, drawn, tuple(ids.tolist()))
            for item in batch
            for sample, drawn, ids in zip(
                item["samples"], item["drawn"], item["input_ids"][0].split(item["segment_lengths"]), strict=True
            )
        ]
        for batch in batches
    ]


def test_packs_are_planned_and_resumed(encoder: Encoder, loader: LoaderConfig, caplog: pytest.LogCaptureFixture):
    own = replace(encoder, image_spec=replace(encoder.image_spec, max_pixels=20000))
    with caplog.at_level("INFO", logger="recipe"):
        dataloader, dataset = open_packs(loader, own)
    assert "augmentation: of 30 samples all may change" in caplog.text
    epochs = [content(dataloader) for _ in range(2)]
    looks = [{name: drawn for step in epoch for name, drawn, _ in step} for epoch in epochs]
    assert all(len(look) == 30 for look in looks) and sum(looks[0][name] != looks[1][name] for name in looks[0]) > 20
    dataset.epoch_of_length = 0
    plan = dataset.plan(0)
    assert plan.tokens.tolist() == [len(ids) for step in epochs[0] for _, _, ids in step]
    killed, dataset = open_packs(loader, own)
    steps = iter(killed)
    seen = sum(item["num_packs"] for _ in range(2) for item in next(steps))
    state = dataset.state_dict(seen, True)
    for workers in (0, 2):
        part = replace(loader, dataloader={"num_workers": workers})
        other, others = open_packs(part, own)
        others.load_state_dict(state)
        assert content(other) == epochs[0][2:]
        assert content(other) == epochs[1]


def test_another_augmentation_is_refused(encoder: Encoder, loader: LoaderConfig):
    own = replace(encoder, image_spec=replace(encoder.image_spec, max_pixels=20000))
    dataloader, dataset = open_packs(loader, own)
    next(iter(dataloader))
    state = dataset.state_dict(2, True)
    for augment in (None, replace(EVERYTHING, horizontal_flip=0.4)):
        _, other = open_packs(replace(loader, augment=augment), own)
        with pytest.raises(
            ConfigError, match=r"plan of the epoch has changed since the checkpoint \(train_loader\.augment"
        ):
            other.load_state_dict(state)
    dataloader, other = open_packs(replace(loader, augment=None), own)
    next(iter(dataloader))
    older = other.state_dict(2, True)
    del older["plan"]["augmentation"]
    other.load_state_dict(older)  # of a version without augmentation


def test_the_first_images_of_a_new_run_are_drawn(encoder: Encoder, loader: LoaderConfig, tmp_path: Path):
    own = replace(encoder, image_spec=replace(encoder.image_spec, max_pixels=20000))
    logged: list[tuple[str, tuple[int, ...]]] = []
    logger: Any = SimpleNamespace(log_images=lambda image, name, **_: logged.append((name, image.shape)))

    def start(augment: AugmentConfig | None, step: int) -> Path:
        folder = tmp_path / f"{augment is None}-{step}"
        dataloader, _ = open_packs(replace(loader, augment=augment), own)
        state: Any = SimpleNamespace(
            train_dataloader=dataloader, timestamp=SimpleNamespace(batch=step), batch=next(iter(dataloader))
        )
        callback = LogFirstSample(encoder.tokenizer, folder)
        callback.fit_start(state, logger)
        callback.batch_start(state, logger)
        return folder

    folder = start(EVERYTHING, 0)
    with Image.open(folder / "augmented_samples.png") as drawing:
        assert logged == [("augmented_samples", (drawing.height, drawing.width, 3))]
    text = (folder / "first_train_sample.txt").read_text()
    dataloader, dataset = open_packs(loader, own)
    shown = first_images(dataset, 12)
    assert len(shown) == 12 and len({sample.id for _, sample, _ in shown}) == 12
    for _, sample, title in shown:
        assert title.split(", ")[0] in ("whole", "part", "flipped whole", "flipped part")
        assert all(item.box[2] <= sample.width for item in sample.objects or ())
    first = content([next(iter(dataloader))])[0][0]
    assert f"sample {first[0]}, " in text and f"\n[shown as] {first[1]}\n" in text
    for folder in (start(None, 0), start(EVERYTHING, 3)):
        assert not (folder / "augmented_samples.png").exists()
    assert "[shown as]" not in (tmp_path / "True-0" / "first_train_sample.txt").read_text()
    assert len(logged) == 1
