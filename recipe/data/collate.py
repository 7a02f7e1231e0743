"""Packs → Batch: padded rows or one packed row, with every index field counted in the flattened tokens."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recipe.schema import Batch, Example, Pack, Role

Collator = Callable[[Sequence[Pack]], Batch]


def one_each(examples: Sequence[Example]) -> list[Pack]:
    """Return one pack per example, as without packing."""
    return [Pack(number, [item], is_inert=item.is_inert) for number, item in enumerate(examples)]


def collate_microbatches(packs: Sequence[Pack], collate: Collator, microbatch_size: int) -> list[Batch]:
    """Cut the packs of a device batch into microbatches and collate each, so that each has its own row length."""
    return [collate(packs[start : start + microbatch_size]) for start in range(0, len(packs), microbatch_size)]


def collate_standard(packs: Sequence[Pack], pad_token_id: int) -> Batch:
    """Return right-padded rows: `input_ids` (B, L), `attention_mask` (B, L), `position_ids` (3, B, L)."""
    examples = [example for pack in packs for example in pack.examples]
    input_ids = pad_sequence([item.input_ids for item in examples], batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(item.input_ids) for item in examples])
    positions = pad_sequence([item.position_ids.T for item in examples], batch_first=True)  # (B, L, 3)
    row_length = input_ids.shape[1]
    return _batch(
        packs,
        examples,
        offsets=[row * row_length for row in range(len(examples))],
        input_ids=input_ids,
        attention_mask=(torch.arange(row_length) < lengths[:, None]).long(),
        position_ids=positions.permute(2, 0, 1).contiguous(),
        segment_lengths=None,
    )


def collate_packed(packs: Sequence[Pack]) -> Batch:
    """Return one row without padding: `input_ids` (1, L), no mask, `position_ids` (4, 1, L)."""
    examples = [example for pack in packs for example in pack.examples]
    lengths = [len(item.input_ids) for item in examples]
    # They restart at 0 for every sample, which is how transformers separates the samples of a row.
    starts = torch.cat([torch.arange(length) for length in lengths])
    rotary = torch.cat([item.position_ids for item in examples], dim=1)  # (3, L)
    return _batch(
        packs,
        examples,
        offsets=list(accumulate(lengths, initial=0))[:-1],
        input_ids=torch.cat([item.input_ids for item in examples])[None],
        attention_mask=None,
        position_ids=torch.cat([starts[None], rotary])[:, None],
        segment_lengths=lengths,
    )


def _batch(
    packs: Sequence[Pack],
    examples: Sequence[Example],
    offsets: list[int],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    segment_lengths: list[int] | None,
) -> Batch:
    """Add what both layouts share; sample i starts at `offsets[i]` of the flattened tokens."""
    supervised = [item.roles.nonzero()[:, 0] for item in examples]
    assert all(int(Role.NONE) == 0 and bool((index > 0).all()) for index in supervised), "no token predicts the first"
    image_ends = list(accumulate((len(item.image_grid_thw) for item in examples), initial=0))
    solved = [(position, image) for position, item in enumerate(examples) for image in item.student_images]
    views = [item.sample.per_image() for item in examples]
    prompts = [offsets[position] + torch.arange(examples[position].prompt_length) for position, _ in solved]
    return Batch(
        samples=[item.sample for item in examples],
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_lengths=segment_lengths,
        label_index=torch.cat([index + offset - 1 for index, offset in zip(supervised, offsets, strict=True)]),
        labels=torch.cat([item.input_ids[index] for item, index in zip(examples, supervised, strict=True)]),
        label_roles=torch.cat([item.roles[index].long() for item, index in zip(examples, supervised, strict=True)]),
        prompt_index=pad_sequence(prompts, batch_first=True, padding_value=-1)
        if prompts
        else torch.empty(0, 0, dtype=torch.int64),
        pixel_patches=torch.cat([item.pixel_patches for item in examples]),
        image_grid_thw=torch.cat([item.image_grid_thw for item in examples]),
        student_images=torch.tensor(
            [image_ends[position + 1] - len(views[position]) + image for position, image in solved], dtype=torch.int64
        ),
        student_samples=[position for position, _ in solved],
        student_views=[views[position][image] for position, image in solved],
        prompt_images=[
            list(range(image_ends[position], image_ends[position] + examples[position].num_prompt_images))
            for position, _ in solved
        ],
        targets=[target for item in examples for target in item.targets],
        noise_seeds=[seed for item in examples for seed in item.noise_seeds],
        contents=[content for item in examples for content in item.contents],
        drawn=[item.drawn for item in examples],
        num_tokens=sum(len(item.input_ids) for item in examples if not item.is_inert),
        num_samples=sum(not item.is_inert for item in examples),
        num_packs=sum(not pack.is_inert for pack in packs),
        skipped={name: reason for pack in packs for name, reason in pack.skipped.items()},
    )
