"""Both collators: every index field points where it says, and the layouts agree."""

import pytest
import torch

from recipe.data.collate import collate_packed, collate_standard, one_each
from recipe.data.encode import Encoder
from recipe.schema import Batch, Example, Role, Sample

PAD = 1


@pytest.fixture
def examples(encoder: Encoder, make_sample) -> list[Example]:
    text = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "red"})
    found = [
        encoder(make_sample(0, 2), [make_sample(5, 1), make_sample(6, 0)]),
        encoder(Sample("text", b"", 0, 0, None, text)),
        encoder(make_sample(1, None)),
        encoder(make_sample(2, 0, width=100, height=40)),
    ]
    for number, example in enumerate(found):
        example.noise_seeds = [number for _ in example.student_images]
    return found


@pytest.fixture(params=["standard", "packed"])
def batch(request: pytest.FixtureRequest, examples: list[Example]) -> Batch:
    return (
        collate_standard(one_each(examples), PAD) if request.param == "standard" else collate_packed(one_each(examples))
    )


def test_labels_stand_one_after_the_position_that_predicts_them(batch: Batch, examples: list[Example]):
    tokens = batch["input_ids"].flatten()
    assert torch.equal(tokens[batch["label_index"] + 1], batch["labels"])
    expected = torch.cat([item.input_ids[item.roles != Role.NONE] for item in examples])
    assert torch.equal(batch["labels"], expected)
    assert set(batch["label_roles"].tolist()) == {Role.TEACHER, Role.STUDENT}
    assert batch["label_roles"].dtype == torch.int64


def test_prompts_images_and_targets_belong_to_their_samples(batch: Batch, examples: list[Example]):
    assert batch["student_samples"] == [0, 2, 3]
    assert batch["student_images"].tolist() == [2, 3, 4]
    assert batch["noise_seeds"] == [0, 2, 3]
    assert [target is None for target in batch["targets"]] == [False, True, False]
    tokens = batch["input_ids"].flatten()
    for row, number in zip(batch["prompt_index"], batch["student_samples"], strict=True):
        example = examples[number]
        assert (row[example.prompt_length :] == -1).all()
        assert torch.equal(tokens[row[: example.prompt_length]], example.input_ids[: example.prompt_length])
    patches = batch["image_grid_thw"].prod(-1)
    ends = patches.cumsum(0)
    for image, number in zip(batch["student_images"], batch["student_samples"], strict=True):
        own = batch["pixel_patches"][ends[image] - patches[image] : ends[image]]
        assert torch.equal(own, examples[number].pixel_patches[-len(own) :])
    assert batch["num_tokens"] == sum(len(item.input_ids) for item in examples)


def test_standard_rows_are_each_sample_then_padding(examples: list[Example]):
    batch = collate_standard(one_each(examples), PAD)
    assert batch["attention_mask"] is not None
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        assert torch.equal(batch["input_ids"][row, :length], example.input_ids)
        assert (batch["input_ids"][row, length:] == PAD).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert torch.equal(batch["position_ids"][:, row, :length], example.position_ids)


def test_the_packed_row_keeps_the_packing_contract(examples: list[Example]):
    batch = collate_packed(one_each(examples))
    assert batch["attention_mask"] is None
    assert torch.equal(batch["input_ids"][0], torch.cat([item.input_ids for item in examples]))
    assert batch["position_ids"].shape == (4, 1, batch["num_tokens"])
    restarts = [place for length in map(len, (item.input_ids for item in examples)) for place in range(length)]
    assert batch["position_ids"][0, 0].tolist() == restarts
    assert torch.equal(batch["position_ids"][1:, 0], torch.cat([item.position_ids for item in examples], dim=1))


def test_a_batch_without_any_picture_is_legal(examples: list[Example], spec):
    for batch in (collate_standard(one_each(examples[1:2]), PAD), collate_packed(one_each(examples[1:2]))):
        assert batch["pixel_patches"].shape == (0, spec.patch_values)
        assert batch["image_grid_thw"].shape == (0, 3)
        assert batch["prompt_index"].shape[0] == 0
        assert batch["student_images"].shape == (0,)
        assert batch["targets"] == []


def test_a_batch_with_nothing_supervised_is_legal(examples: list[Example]):
    batch = collate_standard(one_each(examples[2:3]), PAD)
    assert batch["label_index"].shape == batch["labels"].shape == batch["label_roles"].shape == (0,)
    assert batch["label_index"].dtype == torch.int64
