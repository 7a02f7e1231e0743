"""The lengths of augmented samples are planned before any image is read, and are those of the encoded samples."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipe.config import (
    AugmentConfig,
    CropConfig,
    ImageConfig,
    PromptConfig,
    TeacherConfig,
)
from recipe.data.augment import Augmentation
from recipe.data.drawn_lengths import DrawnTable, with_draws
from recipe.data.encode import Encoder
from recipe.data.image import image_spec
from recipe.data.lengths import LengthTable, count_lengths, count_teachers
from recipe.data.maker import ExampleMaker
from recipe.data.teachers import TeacherPool
from recipe.schema import Object, Sample
from recipe.upstream.checked_stream import CheckedStream
from recipe.upstream.storage import open_streams

EVERYTHING = AugmentConfig(horizontal_flip=0.5, crop=CropConfig(probability=0.8), scale_jitter=[0.5, 2.0])
NATIVE = AugmentConfig(crop=CropConfig(probability=1.0, scale=[0.05, 0.5], ratio=[0.3, 3.0], enlarge=False))
SAYS = "on the left of the large blue circle"
CAPTIONS = ["red star", SAYS, "what?", 'a "b" ', "white-knight", "左边的狗", "ü (x)", "bus 42", "]}, {[", "leftmost"]


def box_part(*box: float) -> dict[str, Any]:
    return {"type": "box", "box": list(box)}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def samples(make_sample) -> list[Sample]:
    """Pictures of many sizes with 0 to 6 objects, some with sides in their captions, and chats of every kind."""
    pictures = [make_sample(number, number % 7, 60 + 37 * number, 50 + 29 * (number % 4)) for number in range(12)]
    for number, picture in enumerate(pictures):
        words = [CAPTIONS[0], *(CAPTIONS[(number + i) % len(CAPTIONS)] for i in range(6))]
        named = tuple(replace(item, caption=words[i]) for i, item in enumerate(picture.objects or ()))
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
    for epoch in (0, 7):
        tokens, patches = table.of_epoch(epoch, repeated, 0, with_answers)
        some, _ = table.of_epoch(epoch, repeated[20:23], 20, with_answers)
        assert some.tolist() == tokens[20:23].tolist()
        for occurrence, position in enumerate(repeated.tolist()):
            example = maker(samples[position].to_mds(), epoch, occurrence, with_answers)
            assert len(example.input_ids) == tokens[occurrence], (samples[position].id, example.drawn)
            assert len(example.pixel_patches) == patches[occurrence], (samples[position].id, example.drawn)
            seen.add((position, example.drawn))
        assert (tokens <= longest[repeated]).all() and (patches <= most[repeated]).all()
    assert len(seen) > 16
