"""Samples of several images: what is stored of them, what is read back, and how they are encoded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.teachers import candidate
from recipe.config import LoaderConfig, PromptConfig, TeacherConfig
from recipe.data.collate import collate_packed, collate_standard, one_each
from recipe.data.encode import Encoder
from recipe.data.lengths import count_captions, count_lengths
from recipe.data.loader import build_train_loader
from recipe.data.stream import ExampleMaker
from recipe.data.teachers import TeacherPool, noise_seeds
from recipe.losses.counts import split_batch
from recipe.schema import FurtherImage, Object, Role, Sample, Searched

CUP, BALL = Object((1.0, 2.0, 3.0, 4.0), "a cup"), Object((0.0, 0.0, 2.0, 2.0), "a ball", area=3.5)
TEXTS = [Sample("text", b"", 0, 0, None, ({"role": "user", "content": "hi"},))]
ANSWER = [
    {"type": "text", "text": '[{"bbox_2d": '},
    {"type": "box", "box": [1.0, 2.0, 3.0, 4.0], "image": 1},
    {"type": "text", "text": ', "label": "a cup"}]'},
]
CHAT = ({"role": "user", "content": "<image><image><image>"}, {"role": "assistant", "content": ANSWER})
SEVERAL = Sample(
    "a", b"first", 10, 20, None, CHAT, further=(FurtherImage(b"2nd", 30, 40, (CUP,)), FurtherImage(b"last", 5, 6, ()))
)


def test_a_row_holds_all_images():
    row = SEVERAL.to_mds()
    assert row["image"] == b"first2ndlast"
    assert Sample.from_mds({**row, "objects": json.loads(json.dumps(row["objects"]))}) == SEVERAL
    searched = replace(SEVERAL, objects=(BALL,), searched=Searched(("a cat",), ("a dog",)))
    assert Sample.from_mds(searched.to_mds()) == searched
    assert Sample.from_mds({**row, "image": b""}) == SEVERAL.without_bytes()


def test_the_row_of_one_image_is_what_it_always_was():
    one = Sample("a", b"first", 10, 20, (CUP, BALL))
    objects = [
        {"box": [1.0, 2.0, 3.0, 4.0], "caption": "a cup"},
        {"box": [0.0, 0.0, 2.0, 2.0], "caption": "a ball", "area": 3.5},
    ]
    expected = {"id": "a", "image": b"first", "width": 10, "height": 20, "objects": objects, "messages": None}
    assert one.to_mds() == expected and list(one.to_mds()) == list(expected)
    assert replace(one, objects=None).to_mds()["objects"] is None
    assert replace(one, objects=()).to_mds()["objects"] == []


def test_a_row_that_lost_bytes_is_refused():
    with pytest.raises(ValueError, match=r"'a' has too few bytes \(7\) for its images"):
        Sample.from_mds({**SEVERAL.to_mds(), "image": b"first2n"})


def test_each_image_has_a_view():
    first, second, third = SEVERAL.per_image()
    assert (first.id, first.image, first.width, first.objects) == ("a#1", b"first", 10, None)
    assert (second.id, second.image, second.height, second.objects) == ("a#2", b"2nd", 40, (CUP,))
    assert (third.id, third.image, third.objects, third.further) == ("a#3", b"last", (), ())
    # The answer is about the second image alone.
    assert second.messages == CHAT
    assert first.messages == third.messages == (CHAT[0], {"role": "assistant", "content": ""})
    both = [*ANSWER, {"type": "box", "box": [0.0, 0.0, 1.0, 1.0]}]
    views = replace(SEVERAL, messages=(CHAT[0], {"role": "assistant", "content": both})).per_image()
    assert all(view.messages == first.messages for view in views)
    one = Sample("a", b"first", 10, 20, None)
    assert one.per_image() == (one,)


@pytest.mark.parametrize("with_answers", [True, False])
@pytest.mark.parametrize("box_coordinates", ["absolute", "normalized_1000"])
def test_planned_lengths_are_those_of_the_encoded_chats(
    encoder: Encoder, make_sample, make_chat, box_coordinates: str, with_answers: bool
):
    encoder = replace(encoder, prompt=PromptConfig(box_coordinates=box_coordinates))
    samples = [make_chat(0, 2), make_sample(1), make_chat(2, 3), make_chat(3, 4)]
    found = count_lengths([sample.without_bytes() for sample in samples], encoder)
    examples = [encoder(sample, with_answers=with_answers) for sample in samples]
    tokens = found.tokens - (0 if with_answers else found.answer_tokens)
    assert tokens.tolist() == [len(example.input_ids) for example in examples]
    assert found.patches.tolist() == [len(example.pixel_patches) for example in examples]
    assert found.num_objects.tolist() == [1, 2, 1 + 2, 1 + 2 + 3]
    assert found.takes_teachers.tolist() == [False, True, False, False]
    assert found.solved_images.tolist() == [len(example.student_images) for example in examples] == [1, 1, 2, 3]
    assert count_lengths([make_sample(1), *TEXTS], encoder).num_solved is None
    longest = count_captions(samples, encoder.tokenizer)
    assert longest.tolist() == [max(t["caption_ids"].shape[1] for t in item.targets if t) for item in examples]


def test_a_chat_of_several_by_hand(encoder: Encoder, make_chat):
    """Two images, an answer, a third image, an answer; the head solves the first two."""
    sample = make_chat(0, 3)
    whole, bare = encoder(sample), encoder(sample, with_answers=False)
    assert whole.image_grid_thw.tolist() == bare.image_grid_thw.tolist() == [[1, 4, 4], [1, 4, 6], [1, 4, 8]]
    assert whole.num_prompt_images == 2 and whole.student_images == [0, 1]
    prompt = whole.input_ids[: whole.prompt_length]
    assert int((prompt == encoder.hf_config.image_token_id).sum()) == 4 + 6
    assert bool((whole.roles[whole.prompt_length :] == Role.STUDENT).any())
    assert not bool((whole.roles[: whole.prompt_length] != Role.NONE).any())
    # Without answers it ends with its last image, before which the first answer stays.
    assert bare.prompt_length == whole.prompt_length < len(bare.input_ids) < len(whole.input_ids)
    assert torch.equal(bare.input_ids, whole.input_ids[: len(bare.input_ids)]) and not bool(bare.roles.any())
    targets = [target for target in whole.targets if target is not None]
    assert [len(target["boxes"]) for target in targets] == [1, 2]
    x1, y1, x2, y2 = sample.further[0].objects[1].box  # of an image of 84 x 60
    expected = torch.tensor([(x1 + x2) / 168, (y1 + y2) / 120, (x2 - x1) / 84, (y2 - y1) / 60])
    torch.testing.assert_close(targets[1]["boxes"][1], expected)
    # A box of a message is scaled with its own image: 60 pixels of height are seen as 56, and 112 of width as 112.
    text = encoder.tokenizer.decode(whole.input_ids)
    assert "at [4, 5, 40, 28]" in text and text.count("at [") == 2


def test_an_image_has_the_noise_of_its_place(encoder: Encoder, make_chat):
    sample, maker = make_chat(0, 3), ExampleMaker(encoder, None, seed=3)
    example = maker(sample.to_mds(), 1, 5)
    assert example.noise_seeds == noise_seeds(3, 1, 5, 1) + noise_seeds(3, 1, 5, 2)[1:]
    only_second = replace(sample, objects=None)
    assert maker(only_second.to_mds(), 1, 5).noise_seeds == example.noise_seeds[1:]


def test_rows_of_a_batch_are_the_solved_images(encoder: Encoder, make_sample, make_chat):
    examples = [encoder(make_chat(0, 3)), encoder(make_sample(1), [make_sample(2)]), encoder(make_chat(3, 2))]
    for batch in (collate_packed(one_each(examples)), collate_standard(one_each(examples), 1)):
        assert batch["student_samples"] == [0, 0, 1, 2]
        assert batch["student_images"].tolist() == [0, 1, 4, 5]
        assert batch["prompt_images"] == [[0, 1], [0, 1], [3, 4], [5, 6]]
        assert [view.id for view in batch["student_views"]] == ["chat-0#1", "chat-0#2", "sample-1", "chat-3#1"]
        lengths = [int((row >= 0).sum()) for row in batch["prompt_index"]]
        assert lengths == [examples[owner].prompt_length for owner in batch["student_samples"]]
        assert torch.equal(batch["prompt_index"][0], batch["prompt_index"][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": None}, "several images but no messages"),
        ({"messages": CHAT}, "3 image placeholders, but the sample holds 2"),
        (
            {"messages": ({"role": "user", "content": [{"type": "box", "box": [0, 0, 9, 9], "image": 2}]},)},
            "a box in `messages` is of image 2, counted from 0, but there are 2",
        ),
    ],
)
def test_what_cannot_be_read_is_named(encoder: Encoder, make_chat, change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"'chat-0'.*{message}"):
        encoder(replace(make_chat(0, 2), **change))


def test_a_damaged_second_image_is_named_or_skipped(
    tmp_path: Path, encoder: Encoder, make_sample, make_chat, write_shards
):
    bad = make_chat(0, 2)
    bad = replace(bad, further=(replace(bad.further[0], image=bad.further[0].image[:300]),))
    stream = write_shards(tmp_path / "set", [make_sample(1), bad, make_chat(2, 2)])
    loader = LoaderConfig(streams={"set": stream}, global_batch_size=1)
    spec = build_train_loader(loader, encoder, None, 0, 1, split_batch)
    with pytest.raises(ValueError, match="sample 'chat-0': cannot decode"):
        list(spec.dataloader)
    spec = build_train_loader(replace(loader, on_bad_sample="skip"), encoder, None, 0, 1, split_batch)
    skipped = [batch["skipped"] for step in spec.dataloader for batch in step]
    assert [set(found) for found in skipped if found] == [{"chat-0"}]


def test_a_teacher_has_one_image(encoder: Encoder, make_sample, make_chat):
    with pytest.raises(ValueError, match=r"not one annotated image, \['chat-0'\]"):
        TeacherPool([make_chat(0), make_sample(1), make_sample(2)], TeacherConfig(num_teachers=1), seed=0)
    with pytest.raises(ValueError, match="its teacher 'chat-0' is not an annotated image"):
        encoder(make_sample(1), [make_chat(0)])
    assert candidate(0, make_sample(1)) is not None and candidate(0, make_chat(0)) is None
