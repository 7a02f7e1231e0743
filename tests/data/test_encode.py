"""Sample → Example: spans, roles, targets, and the same prompt in training and at inference."""

import base64
import json
import unicodedata
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import Qwen2TokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from recipe.config import PromptConfig
from recipe.data import encode
from recipe.data.encode import Encoder
from recipe.data.image import resized_size
from recipe.data.lengths import fingerprint
from recipe.images import open_image
from recipe.schema import Example, Object, Role, Sample
from recipe.tiny import SPECIAL_TOKENS, build_tiny_tokenizer

CHAT = (
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A star."},
    {"role": "user", "content": "Its colour?"},
    {"role": "assistant", "content": "Red."},
)

PLAIN_TOKENS = ["<tool_call>", "</tool_call>"] + [
    f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
]


def decode(encoder: Encoder, ids: torch.Tensor) -> str:
    return encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def supervised(encoder: Encoder, example: Example, role: Role) -> str:
    return decode(encoder, example.input_ids[example.roles == role])


def test_ids_of_short_texts_are_kept(encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    """Kept or not, alone or in a list, once or twice, they are the tokenizer's."""
    monkeypatch.setattr(encode, "KEPT_TEXTS", 2)
    encoder = replace(encoder)
    long = "a red circle, " * 40
    for texts in (["a star", long, "a star"], ["a star", "a cross", "an ellipse", long], [], ["an ellipse"]):
        assert encoder.ids(texts) == [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert list(encoder._kept) == ["a star", "a cross"]


def test_composers_copy_of_a_batch_shares_its_samples(make_sample):
    sample = make_sample(0, 2)
    assert deepcopy({"samples": [sample]})["samples"][0] is sample


def test_ids_and_grids_equal_the_processors(encoder: Encoder, processor: Any, make_sample, spec):
    student, teacher = make_sample(0, 2), make_sample(1, 1, width=130, height=40)
    example = encoder(student, [teacher])
    width, height = resized_size(teacher.width, teacher.height, spec)
    box = [round(v * s) for v, s in zip(teacher.objects[0].box, (width / 130, height / 40) * 2, strict=True)]
    answer = json.dumps([{"bbox_2d": box, "label": teacher.objects[0].caption}])
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": encoder.prompt.detect}]}
    chat = [
        {"role": "system", "content": encoder.prompt.system},
        turn,
        {"role": "assistant", "content": answer},
        turn,
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    pictures = [open_image(teacher.image), open_image(student.image)]
    expected = processor(text=[text], images=pictures, return_tensors="pt")
    assert torch.equal(example.input_ids[: example.prompt_length], expected["input_ids"][0])
    assert torch.equal(example.image_grid_thw, expected["image_grid_thw"])
    assert len(example.pixel_patches) == len(expected["pixel_values"])


@pytest.mark.parametrize("box_coordinates", ["absolute", "normalized_1000"])
def test_training_prompt_ids_equal_inference_prompt_ids(encoder: Encoder, make_sample, box_coordinates: str):
    encoder = replace(encoder, prompt=PromptConfig(box_coordinates=box_coordinates))
    teachers = [make_sample(8, 2), make_sample(9, 0)]
    trained = encoder(make_sample(0, 3), teachers)
    asked = encoder(make_sample(0, None), teachers)
    assert torch.equal(asked.input_ids, trained.input_ids[: trained.prompt_length])
    assert asked.prompt_length == trained.prompt_length == len(asked.input_ids)
    assert torch.equal(asked.position_ids, trained.position_ids[:, : trained.prompt_length])
    assert torch.equal(asked.pixel_patches, trained.pixel_patches)
    assert not (asked.roles == Role.STUDENT).any()
    assert asked.targets == [None] and asked.student_images == [0]


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("qwen2_vl", "normalized_1000"), ("qwen2_5_vl", "absolute"), ("qwen3_vl", "normalized_1000")],
)
def test_boxes_are_written_as_the_base_was_trained(encoder: Encoder, make_sample, model_type: str, expected: str):
    """Unless the prompt says otherwise; token counts are kept for both ways alike."""
    by_family = replace(encoder, hf_config=SimpleNamespace(model_type=model_type))
    for box_coordinates in ("absolute", "normalized_1000"):
        given = replace(by_family, prompt=PromptConfig(box_coordinates=box_coordinates))
        is_same = box_coordinates == expected
        assert (given.segments(make_sample(0)) == by_family.segments(make_sample(0))) == is_same
        assert (fingerprint(given) == fingerprint(by_family)) == is_same


@pytest.mark.parametrize("box_coordinates", ["absolute", "normalized_1000"])
def test_boxes_of_a_chat_are_written_as_those_of_an_answer(encoder: Encoder, make_sample, spec, box_coordinates: str):
    encoder = replace(encoder, prompt=PromptConfig(box_coordinates=box_coordinates))
    sample = make_sample(0, 1, width=130, height=40)
    box = list(sample.objects[0].box)
    text, part = {"type": "text", "text": "at "}, {"type": "box", "box": box}
    turns = [("system", [part]), ("user", [{"type": "image"}, part]), ("assistant", [text, part])]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    example = encoder(replace(sample, messages=messages))
    width, height = resized_size(130, 40, spec) if box_coordinates == "absolute" else (1000, 1000)
    expected = str([round(v * s) for v, s in zip(box, (width / 130, height / 40) * 2, strict=True)])
    assert supervised(encoder, example, Role.STUDENT) == f"at {expected}<|im_end|>"
    assert decode(encoder, example.input_ids[: example.prompt_length]).count(expected) == 2
    assert expected in supervised(encoder, encoder(sample), Role.STUDENT)


def test_answers_and_their_ends_are_supervised_by_role(encoder: Encoder, make_sample):
    example = encoder(make_sample(0, 1, width=56, height=56), [make_sample(1, 0)])
    assert supervised(encoder, example, Role.TEACHER) == "[]<|im_end|>"
    assert supervised(encoder, example, Role.STUDENT) == (
        '[{"bbox_2d": [0, 1, 20, 30], "label": "red star 0 0"}]<|im_end|>'
    )
    assert not (example.roles[: example.prompt_length] == Role.STUDENT).any()
    assert decode(encoder, example.input_ids[: example.prompt_length]).endswith("<|im_start|>assistant\n")
    assert decode(encoder, example.input_ids[-2:]) == "<|im_end|>\n"


def test_a_student_without_its_answer_is_its_prompt_with_a_target(encoder: Encoder, make_sample):
    """`prompt.student_answer: false`; that the head's outputs do not change: `tests/test_exactness.py`."""
    sample, teacher = make_sample(0, 2), make_sample(1, 1)
    whole = encoder(sample, [teacher])
    bare = replace(encoder, prompt=PromptConfig(student_answer=False))(sample, [teacher])
    assert torch.equal(bare.input_ids, whole.input_ids[: whole.prompt_length])
    assert bare.prompt_length == len(bare.input_ids) < len(whole.input_ids)
    assert supervised(encoder, bare, Role.TEACHER) == supervised(encoder, whole, Role.TEACHER) != ""
    assert supervised(encoder, bare, Role.STUDENT) == ""
    (target,), (expected,) = bare.targets, whole.targets
    assert target is not None and expected is not None
    assert all(torch.equal(target[name], expected[name]) for name in ("boxes", "caption_ids"))


def test_the_target_is_normalised_without_crowds(encoder: Encoder, make_sample):
    objects = (
        Object((8, 6, 24, 18), "red"),
        Object((0, 0, 80, 60), "", iscrowd=True),
        Object((40, 30, 80, 60), "star a"),
    )
    (target,) = encoder(make_sample(0, objects=objects)).targets
    assert target is not None
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.75, 0.75, 0.5, 0.5]]))
    lengths = [len(encoder.tokenizer.tokenize(text)) + 1 for text in ("red", "star a")]
    assert target["caption_ids"].shape == (2, max(lengths))
    for row, length in zip(target["caption_ids"], lengths, strict=True):
        assert row[length - 1] == encoder.tokenizer.eos_token_id
        assert (row[length:] == -100).all()
    assert decode(encoder, target["caption_ids"][1][: lengths[1] - 1]) == "star a"


def test_a_picture_that_holds_nothing_is_a_target_and_an_answer(encoder: Encoder, make_sample):
    example = encoder(make_sample(0, 0))
    (target,) = example.targets
    assert target is not None and target["boxes"].shape == (0, 4) and target["caption_ids"].shape[0] == 0
    assert supervised(encoder, example, Role.STUDENT) == "[]<|im_end|>"


def test_text_only_samples(encoder: Encoder, spec):
    example = encoder(Sample("text", b"", 0, 0, None, CHAT))
    assert example.image_grid_thw.shape == (0, 3)
    assert example.pixel_patches.shape == (0, spec.patch_values)
    assert example.student_images == []
    assert supervised(encoder, example, Role.STUDENT) == "A star.<|im_end|>Red.<|im_end|>"


def test_the_prompt_of_a_longer_chat_holds_no_answer(encoder: Encoder, make_sample):
    example = encoder(make_sample(0, 1, messages=CHAT))
    assert decode(encoder, example.input_ids[: example.prompt_length]).endswith(
        "What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not (example.roles[: example.prompt_length] == Role.STUDENT).any()
    assert example.targets[0] is not None
    asked = encoder(make_sample(0, None, messages=CHAT[:1]))
    assert torch.equal(asked.input_ids, example.input_ids[: example.prompt_length])


def test_the_picture_is_kept_only_when_asked(encoder: Encoder, make_sample):
    assert encoder(make_sample()).sample.image == b""
    assert replace(encoder, keep_image=True)(make_sample()).sample.image == make_sample().image


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objects": (Object((1, 1, 9, 9), "star " * 40),)}, r"caption 'star .* 4\d tokens .*max_caption_tokens"),
        ({"objects": (Object((1, 1, 9, 9), "a<|im_end|>"),)}, "control token"),
        ({"image": b"GIF89a"}, "cannot decode"),
        ({"image": b"", "width": 0, "height": 0}, "has objects but no image"),
        ({"image": b"", "width": 0, "height": 0, "objects": None}, "neither an image nor messages"),
        ({"width": 400}, "does not have the stated 400 x 60 pixels"),
    ],
)
def test_unusable_samples_are_named_with_the_remedy(encoder: Encoder, make_sample, changes: dict, message: str):
    with pytest.raises(ValueError, match=f"sample 'bad': .*{message}"):
        encoder(replace(make_sample(0, 1, id="bad"), **changes))


def test_a_conversation_above_max_seq_len_is_named(encoder: Encoder, make_sample):
    short = replace(encoder, max_seq_len=50)
    with pytest.raises(ValueError, match=r"'sample-0': .* tokens long .* max_seq_len 50: raise max_seq_len"):
        short(make_sample())


@pytest.mark.parametrize("teacher", [{"objects": None}, {"image": b"", "width": 0, "height": 0}])
def test_teachers_must_be_annotated_pictures(encoder: Encoder, make_sample, teacher: dict):
    with pytest.raises(ValueError, match=r"'sample-0'.*teacher 'sample-9' is not an annotated image"):
        encoder(make_sample(), [replace(make_sample(9), **teacher)])


@pytest.mark.shared_data
def test_segments_tokenised_alone_equal_qwens_own_ids(shared_data: Path, encoder: Encoder):
    """With the real vocabulary: ids of whole texts, and of a chat cut into segments."""
    tokenizer = real_tokenizer(shared_data / "tokenizer" / "qwen.tiktoken")
    for case in json.loads((shared_data / "tokenizer" / "expected_ids.json").read_text(encoding="utf-8")):
        assert tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]
    real = replace(encoder, tokenizer=tokenizer)
    example = real(Sample("text", b"", 0, 0, None, CHAT))
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + "".join(
        f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in CHAT
    )
    assert example.input_ids.tolist() == tokenizer(text)["input_ids"]


CAPTIONS = (
    "靠在墙边的红色自行车",
    "دراجة حمراء بجانب الجدار",
    "👩‍🚀 beside a 🚀, 100% ∑",
    "ein grüner Stern, naïve",
    "e\u0301 in two code points",
    "लाल तारा\nस्टार",
)


def assert_captions_come_back(encoder: Encoder, sample: Sample) -> None:
    """Each target is the caption's own ids and the end; Qwen's tokenizer puts texts in the normal form C."""
    objects = tuple(Object((5.0, 3.0 * i, 30.0, 3.0 * i + 20), caption) for i, caption in enumerate(CAPTIONS))
    example = encoder(replace(sample, objects=objects))
    assert example.targets[0] is not None
    ends = encoder.tokenizer.eos_token_id
    for caption, row in zip(CAPTIONS, example.targets[0]["caption_ids"], strict=True):
        ids = row[row != -100]
        assert ids[-1] == ends and ends not in ids[:-1].tolist()
        normal = unicodedata.normalize("NFC", caption)
        assert encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == normal


def test_captions_in_any_language(encoder: Encoder, make_sample):
    assert_captions_come_back(replace(encoder, max_caption_tokens=80), make_sample(0))


@pytest.mark.shared_data
def test_captions_in_any_language_with_qwens_vocabulary(shared_data: Path, encoder: Encoder, make_sample):
    tokenizer = real_tokenizer(shared_data / "tokenizer" / "qwen.tiktoken")
    hf_config = deepcopy(encoder.hf_config)
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        setattr(hf_config, f"{name.removesuffix('_pad')}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    assert_captions_come_back(replace(encoder, tokenizer=tokenizer, hf_config=hf_config), make_sample(0))


def real_tokenizer(tiktoken_file: Path) -> Qwen2TokenizerFast:
    """Qwen2.5's byte-level BPE, from its table of ranks."""
    names = bytes_to_unicode()
    pairs = (line.split() for line in tiktoken_file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    written = {token: "".join(names[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=lambda item: ranks[item]):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        cuts.sort(key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
        merges += [(written[left], written[right]) for left, right in cuts]
    tiny = build_tiny_tokenizer(["a"], vocab_size=300).backend_tokenizer
    backend = Tokenizer(models.BPE({written[token]: rank for token, rank in ranks.items()}, merges))
    backend.normalizer, backend.pre_tokenizer, backend.decoder = tiny.normalizer, tiny.pre_tokenizer, tiny.decoder
    backend.add_special_tokens(SPECIAL_TOKENS)
    backend.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_TOKENS])
    return Qwen2TokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
