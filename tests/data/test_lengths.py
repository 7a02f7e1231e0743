"""Lengths from records alone are those of the encoded samples, teachers and pixel budgets counted."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.shapes import draw_scene
from recipe.config import ConfigError, ImageConfig, LoaderConfig, PackingConfig, PromptConfig, TeacherConfig
from recipe.data import lengths as lengths_module
from recipe.data.encode import Encoder
from recipe.data.image import image_spec
from recipe.data.lengths import (
    LengthTable,
    check_records,
    count_lengths,
    count_teachers,
    fingerprint,
    read_lengths,
    read_longest_caption,
)
from recipe.data.maker import ExampleMaker
from recipe.data.teachers import TeacherPool
from recipe.records import RECORDS_FILE
from recipe.schema import Object, Sample
from recipe.upstream.checked_stream import CheckedStream
from recipe.upstream.storage import CheckedDataset, open_streams

CHAT = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "a red star"})
IMAGE_CHAT = ({"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "blue"})


@pytest.fixture(scope="module")
def samples(make_sample) -> list[Sample]:
    """Images of several sizes with 0 to 4 objects, chats with and without an image."""
    pictures = [make_sample(number, number % 5, 40 + 31 * number, 30 + 17 * (number % 4)) for number in range(12)]
    pictures[3] = replace(pictures[3], objects=None, messages=IMAGE_CHAT)
    pictures[4] = replace(pictures[4], objects=None)
    return [*pictures, Sample("text", b"", 0, 0, None, CHAT)]


@pytest.fixture
def streams(tmp_path: Path, samples: list[Sample], write_shards) -> list[CheckedStream]:
    return open_streams(
        {"a": write_shards(tmp_path / "a", samples[:7]), "b": write_shards(tmp_path / "b", samples[7:])}
    )


def without_bytes(samples: Sequence[Sample]) -> list[Sample]:
    return [replace(sample, image=b"") for sample in samples]


@pytest.mark.parametrize("box_coordinates", ["absolute", "normalized_1000"])
@pytest.mark.parametrize("max_pixels", [None, 6000])
def test_lengths_are_those_of_the_encoded_samples(
    encoder: Encoder, processor, samples: list[Sample], box_coordinates: str, max_pixels: int | None
):
    spec = image_spec(processor.image_processor, ImageConfig(min_pixels=784, max_pixels=max_pixels))
    encoder = replace(encoder, prompt=PromptConfig(box_coordinates=box_coordinates), image_spec=spec)
    found = count_lengths(without_bytes(samples), encoder)
    examples = [encoder(sample) for sample in samples]
    assert found.tokens.tolist() == [len(example.input_ids) for example in examples]
    assert found.patches.tolist() == [len(example.pixel_patches) for example in examples]
    assert found.takes_teachers.tolist() == [True] * 3 + [False] + [True] * 8 + [False]


def test_lengths_of_an_epoch_count_the_teachers_that_are_shown(encoder: Encoder, samples: list[Sample], make_sample):
    # The pool shares samples with the data set, which are never their own teachers.
    config = TeacherConfig(num_teachers=3, teacher_ratio=0.7)
    pool = TeacherPool([samples[0], samples[1], *(make_sample(50 + n, n, 60 + 40 * n) for n in range(3))], config, 3)
    table = LengthTable(count_lengths(without_bytes(samples), encoder), pool, *count_teachers(pool, encoder))
    repeated = np.array([*range(len(samples)), *range(len(samples))])
    maker = ExampleMaker(encoder, pool, seed=3)
    for epoch in (0, 1):
        tokens, patches = table.of_epoch(epoch, repeated)
        examples = [
            maker(samples[position].to_mds(), epoch, occurrence) for occurrence, position in enumerate(repeated)
        ]
        assert tokens.tolist() == [len(example.input_ids) for example in examples]
        assert patches.tolist() == [len(example.pixel_patches) for example in examples]
    assert len({len(example.image_grid_thw) for example in examples}) >= 3


def test_lengths_are_counted_once_for_each_tokenizer_prompt_and_budget(
    streams: list[CheckedStream], samples: list[Sample], encoder: Encoder, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    expected = count_lengths(without_bytes(samples), encoder)
    first = read_lengths(streams, encoder)
    assert np.array_equal(first.tokens, expected.tokens) and np.array_equal(first.id_hashes, expected.id_hashes)
    assert "counted 7 samples" in caplog.text and "counted 6 samples" in caplog.text

    def fail(*arguments):
        raise AssertionError("counted again")

    other = replace(encoder, prompt=PromptConfig(detect="Find."))
    changed = read_lengths(streams, other)
    assert not np.array_equal(changed.tokens, expected.tokens)
    monkeypatch.setattr(lengths_module, "count_lengths", fail)
    assert np.array_equal(read_lengths(streams, encoder).tokens, expected.tokens)
    assert np.array_equal(read_lengths(streams, other).tokens, changed.tokens)


def test_the_fingerprint_tells_what_token_counts_depend_on(encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    spec = encoder.image_spec
    others = [
        replace(encoder, prompt=PromptConfig(system="")),
        replace(encoder, prompt=PromptConfig(box_coordinates="normalized_1000")),
        replace(encoder, image_spec=replace(spec, max_pixels=spec.max_pixels // 2)),
    ]
    prints = {fingerprint(encoder), *map(fingerprint, others)}
    assert fingerprint(replace(encoder, max_seq_len=7)) in prints
    # Another chat format in the code.
    monkeypatch.setattr("recipe.data.chat.END_OF_TURN", "<|endoftext|>")
    assert len(prints | {fingerprint(encoder)}) == 5


def test_data_without_records_is_refused_with_the_remedy(streams: list[CheckedStream], encoder: Encoder):
    Path(streams[1].local, RECORDS_FILE).unlink()
    with pytest.raises(ValueError, match=r"b has no records.jsonl.gz .* convert the data set again"):
        read_lengths(streams, encoder)


def test_records_of_other_shards_are_refused(streams: list[CheckedStream], encoder: Encoder):
    path = Path(streams[0].local, "index.json")
    index = json.loads(path.read_text())
    index["shards"][0]["raw_data"]["hashes"] = {"xxh64": "0"}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="written for other shards"):
        read_lengths(streams, encoder)


def test_a_sample_that_cannot_be_encoded_is_named(encoder: Encoder, make_sample):
    with pytest.raises(ValueError, match=r"'long'.*over 200 times"):
        count_lengths([replace(make_sample(1), id="long", width=9000, height=10)], encoder)
    with pytest.raises(ValueError, match=r"'odd'.*control token"):
        bad = replace(make_sample(1), id="odd", objects=None, messages=({"role": "user", "content": "<|im_end|>"},))
        count_lengths([bad], encoder)


def test_a_read_only_folder_is_counted_every_time(streams, encoder: Encoder, monkeypatch, caplog):
    def refuse(*arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lengths_module.np, "savez", refuse)
    assert len(read_lengths(streams, encoder)) == 13
    assert "the next run counts again" in caplog.text


def test_positions_count_over_all_streams(streams: list[CheckedStream], samples: list[Sample]):
    rows = CheckedDataset(streams=streams, batch_size=1)
    assert [rows[position]["id"] for position in range(13)] == [sample.id for sample in samples]


def test_damaged_counts_are_counted_anew(streams: list[CheckedStream], encoder: Encoder, caplog):
    expected = read_lengths(streams, encoder)
    (path,) = Path(streams[0].local).glob("**/lengths-*.npz")
    for damaged in (b"", path.read_bytes()[:-30]):
        path.write_bytes(damaged)
        caplog.clear()
        found = read_lengths(streams, encoder)
        assert np.array_equal(found.tokens, expected.tokens)
        assert f"{path} is damaged" in caplog.text


def test_damaged_records_of_a_cache_are_fetched_again(
    tmp_path: Path, samples: list[Sample], write_shards, encoder: Encoder, caplog
):
    stored = write_shards(tmp_path / "stored", samples)
    stream = {**stored, "remote": stored["local"], "local": str(tmp_path / "cache")}
    expected = read_lengths(open_streams({"a": stream}), encoder)
    (records,) = (tmp_path / "cache").glob(f"**/{RECORDS_FILE}")
    (counts,) = (tmp_path / "cache").glob("**/lengths-*.npz")
    counts.unlink()
    records.write_bytes(records.read_bytes()[:-30])
    assert np.array_equal(read_lengths(open_streams({"a": stream}), encoder).tokens, expected.tokens)
    assert f"{records} cannot be read" in caplog.text and "fetching it again" in caplog.text


def test_the_longest_teachers_bound_every_epoch(samples: list[Sample], encoder: Encoder, make_sample):
    others = [make_sample(n, n % 3, 40 + 20 * n) for n in range(50, 54)]
    pool = TeacherPool([*others, samples[9], samples[11]], TeacherConfig(None, 2, 1.0), 3)
    table = LengthTable(count_lengths(without_bytes(samples), encoder), pool, *count_teachers(pool, encoder))
    drawn = np.stack([np.stack(table.of_epoch(epoch, np.arange(len(samples)))) for epoch in range(200)])
    assert np.array_equal(drawn.max(axis=0), np.stack(table.longest()))  # 15 pairs: each is shown to each


def test_the_longest_caption_is_the_longest_that_is_encoded(
    tmp_path: Path, samples: list[Sample], encoder: Encoder, write_shards, monkeypatch, caplog
):
    """Of all streams, once for a tokenizer; crowd regions, which are never captioned, left out."""
    caplog.set_level(logging.INFO)
    crowd = Object((1.0, 1.0, 9.0, 9.0), "a crowd of very many people that nobody has counted so far", iscrowd=True)
    described = Object((1.0, 1.0, 9.0, 9.0), "the large 红色 star behind it")
    longer = replace(samples[8], objects=(*(samples[8].objects or ()), crowd, described))
    kept = [*samples[:8], longer, *samples[9:]]
    streams = open_streams({"a": write_shards(tmp_path / "a", kept[:7]), "b": write_shards(tmp_path / "b", kept[7:])})
    targets = [target for sample in kept for target in encoder(sample).targets if target is not None]
    expected = max(target["caption_ids"].shape[1] for target in targets if len(target["boxes"]))
    assert read_longest_caption(streams, encoder.tokenizer) == expected
    assert read_longest_caption(streams[:1], encoder.tokenizer) < expected
    assert "counted 7 samples for the longest caption" in caplog.text
    monkeypatch.setattr(lengths_module, "count_captions", None)
    assert read_longest_caption(streams, encoder.tokenizer) == expected
    assert replace(encoder, max_caption_tokens=expected)(longer).targets != [None]
    with pytest.raises(ValueError, match=f"is {expected} tokens long .* above {expected - 1}"):
        replace(encoder, max_caption_tokens=expected - 1)(longer)


def test_data_without_captions_or_records(tmp_path: Path, samples: list[Sample], encoder: Encoder, write_shards):
    nothing = [replace(sample, objects=None) for sample in samples if sample.messages]
    assert read_longest_caption(open_streams({"a": write_shards(tmp_path / "a", nothing)}), encoder.tokenizer) == 0
    (tmp_path / "a" / RECORDS_FILE).unlink()
    for path in tmp_path.glob("a/caption_lengths-*.npz"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has no records.jsonl.gz .* or set caption_decoder.max_caption_tokens"):
        read_longest_caption(open_streams({"a": {"local": str(tmp_path / "a")}}), encoder.tokenizer)


def problem_of(write_shards, folder: Path, samples: list[Sample], encoder: Encoder, **changes: Any) -> str:
    """What is said of the records of a training set before training; empty if nothing."""
    streams = open_streams({"a": write_shards(folder, samples)})
    try:
        check_records("train_loader", streams, encoder, None, LoaderConfig(**changes))
    except ConfigError as error:
        return str(error)
    return ""


def test_records_are_judged_before_training(
    write_shards, tmp_path: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    good, packed = draw_scene(1, 0, 84), PackingConfig()
    wordy = replace(good, id="wordy", objects=(Object((1.0, 2.0, 9.0, 9.0), "a very long caption " * 9),))
    crowd = replace(wordy, id="crowd", objects=tuple(replace(item, iscrowd=True) for item in wordy.objects or ()))
    chatty = Sample("chatty", b"", 0, 0, None, ({"role": "user", "content": "x y " * encoder.max_seq_len},))
    flat = replace(good, id="flat", width=2000, height=8)
    assert problem_of(write_shards, tmp_path / "1", [good, crowd], encoder) == ""
    found = problem_of(write_shards, tmp_path / "2", [good, wordy], encoder)
    assert (
        "train_loader: 1 of 2 samples" in found and "'wordy'" in found and "caption_decoder.max_caption_tokens" in found
    )
    assert "'wordy'" in problem_of(write_shards, tmp_path / "3", [good, wordy], encoder, packing=packed)
    found = problem_of(write_shards, tmp_path / "4", [good, wordy, chatty], encoder)
    assert "'wordy'" in found and "'chatty'" in found and "raise max_seq_len" in found
    assert problem_of(write_shards, tmp_path / "5", [good, chatty], encoder, packing=packed) == ""  # the plan judges it
    assert not caplog.records
    assert problem_of(write_shards, tmp_path / "6", [good, wordy], encoder, on_bad_sample="skip") == ""
    assert "'wordy'" in caplog.text
    assert "'flat'" in problem_of(write_shards, tmp_path / "7", [good, flat], encoder)
    skips = {"packing": packed, "on_bad_sample": "skip"}
    assert "'flat'" in problem_of(write_shards, tmp_path / "8", [good, flat], encoder, **skips)  # it cannot be planned


def test_evaluation_records_are_judged_with_the_teachers_they_get(
    write_shards, tmp_path: Path, encoder: Encoder, samples: list[Sample], make_sample
) -> None:
    pool = TeacherPool([make_sample(50 + n, n, 60 + 40 * n) for n in range(4)], TeacherConfig(num_teachers=1), 0)
    shown = [replace(sample, id=f"{sample.id}-{at}") for at in range(3) for sample in samples if sample.has_image]
    cut = len(shown) // 2
    streams = {"a": write_shards(tmp_path / "a", shown[:cut]), "b": write_shards(tmp_path / "b", shown[cut:])}
    maker = ExampleMaker(encoder, pool, 0)
    lengths = [len(maker(sample.to_mds(), 0, at).input_ids) for at, sample in enumerate(shown)]
    most = sorted(lengths)[len(lengths) // 2]
    with pytest.raises(ConfigError) as raised:
        check_records("eval_loader", open_streams(streams), replace(encoder, max_seq_len=most), pool, LoaderConfig())
    for part in (lengths[:cut], lengths[cut:]):
        told = f"{sum(length > most for length in part)} of {len(part)} samples .* up to {max(part)} in"
        assert re.search(told, str(raised.value)), told
    check_records(
        "eval_loader", open_streams(streams), replace(encoder, max_seq_len=max(lengths)), pool, LoaderConfig()
    )


def test_records_that_are_missing_are_reported(
    write_shards, tmp_path: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    keywords = write_shards(tmp_path / "a", [draw_scene(1, 0, 84)])
    for path in Path(keywords["local"]).rglob("records.jsonl*"):
        path.unlink()
    check_records("eval_loader", open_streams({"a": keywords}), encoder, None, LoaderConfig())
    assert "captions and lengths are not judged before training" in caplog.text
    with pytest.raises(ConfigError, match=r"train_loader: .* has no records"):
        check_records(
            "train_loader", open_streams({"a": keywords}), encoder, None, LoaderConfig(packing=PackingConfig())
        )
