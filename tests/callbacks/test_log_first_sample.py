"""The first sample as text: roles, collapsed images, target; the same for padded rows and a packed row."""

from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from recipe.callbacks.samples import LogFirstSample, describe_first_sample
from recipe.data.collate import collate_packed, collate_standard, one_each
from recipe.schema import Example, Role, Sample, Target
from recipe.tiny import build_tiny_tokenizer, tokenizer_corpus


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tiny_tokenizer(tokenizer_corpus())


def encode(tokenizer: PreTrainedTokenizerBase, segments: list[tuple[str, Role]], target: Target | None) -> Example:
    ids = [tokenizer.encode(text, add_special_tokens=False) for text, _ in segments]
    roles = [[int(role)] * len(part) for part, (_, role) in zip(ids, segments, strict=True)]
    input_ids = torch.tensor(list(chain.from_iterable(ids)))
    grids = [[1, 4, 8], [1, 2, 2]] if target is not None else []
    return Example(
        sample=Sample("picture-1" if target is not None else "text-2", b"", 8, 8, None),
        input_ids=input_ids,
        roles=torch.tensor(list(chain.from_iterable(roles)), dtype=torch.uint8),
        position_ids=torch.arange(len(input_ids)).expand(3, -1),
        prompt_length=3,
        pixel_patches=torch.zeros(sum(h * w for _, h, w in grids), 3, dtype=torch.uint8),
        image_grid_thw=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        num_prompt_images=len(grids),
        student_images=[0] if grids else [],
        targets=[target] if grids else [],
        noise_seeds=[0] if grids else [],
        contents=[""] if grids else [],
    )


@pytest.fixture
def examples(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    caption = [*tokenizer.encode("red circle"), cast(int, tokenizer.eos_token_id)]
    target = Target(boxes=torch.tensor([[0.5, 0.25, 0.125, 1.0]]), caption_ids=torch.tensor([[*caption, -100, -100]]))
    pictured = [
        ("<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 8 + "<|vision_end|>find<|im_end|>\n", Role.NONE),
        ("a square<|im_end|>", Role.TEACHER),
        ("\n<|vision_start|><|image_pad|><|vision_end|>find", Role.NONE),
        ("a circle<|im_end|>", Role.STUDENT),
    ]
    return [
        encode(tokenizer, pictured, target),
        encode(tokenizer, [("hello", Role.NONE), ("a much longer text " * 9, Role.STUDENT)], None),
    ]


def test_description(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> None:
    lengths = [len(tokenizer.encode(text)) for text in ("a square<|im_end|>", "a circle<|im_end|>")]
    text = describe_first_sample(collate_standard(one_each(examples), pad_token_id=0), tokenizer)
    assert text.startswith(f"sample picture-1, {len(examples[0].input_ids)} tokens\n[prompt, ")
    assert "tokens]\n<|im_start|>user\n<|vision_start|><image 4x2><|vision_end|>find<|im_end|>\n" in text
    assert f"[teacher answer, {lengths[0]} tokens]\na square<|im_end|>\n[prompt" in text
    assert "<|vision_start|><image 1x1><|vision_end|>find" in text
    assert f"[student answer, {lengths[1]} tokens]\na circle<|im_end|>\n[target] 1 objects" in text
    assert text.endswith("(0.500, 0.250, 0.125, 1.000) red circle")
    assert "hello" not in text


def test_padded_equals_packed(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> None:
    for order in (examples, examples[::-1]):
        standard = describe_first_sample(collate_standard(one_each(order), pad_token_id=0), tokenizer)
        assert standard == describe_first_sample(collate_packed(one_each(order)), tokenizer)
        assert standard == describe_first_sample(collate_packed(one_each(order[:1])), tokenizer)


def test_text_only_sample_has_no_target(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> None:
    assert "[target]" not in describe_first_sample(collate_packed(one_each(examples[::-1])), tokenizer)


def test_not_annotated(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> None:
    batch = collate_packed(one_each(examples[:1]))
    batch["targets"] = [None]
    assert describe_first_sample(batch, tokenizer).endswith("[target] not annotated: no detection loss")


def test_callback_writes_once_each(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = LogFirstSample(tokenizer, tmp_path / "run")
    first = cast(
        Any, SimpleNamespace(batch=[collate_packed(one_each(examples)), collate_packed(one_each(examples[::-1]))])
    )
    second = cast(Any, SimpleNamespace(batch=[collate_packed(one_each(examples[::-1]))]))
    for state in (first, second):
        callback.batch_start(state, cast(Any, None))
    callback.eval_batch_start(second, cast(Any, None))
    assert (tmp_path / "run" / "first_train_sample.txt").read_text().startswith("sample picture-1")
    assert (tmp_path / "run" / "first_eval_sample.txt").read_text().startswith("sample text-2")

    monkeypatch.setattr("composer.utils.dist.get_global_rank", lambda: 1)
    LogFirstSample(tokenizer, tmp_path / "other").batch_start(first, cast(Any, None))
    assert not (tmp_path / "other").exists()
