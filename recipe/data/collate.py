"""Examples → Batch: padded rows or one packed row, with every index field counted in the flattened tokens."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recipe.schema import Batch, Example, Role


def collate_standard(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Right-padded rows: `input_ids` (B, L), `attention_mask` (B, L), `position_ids` (3, B, L)."""
    input_ids = pad_sequence([item.input_ids for item in examples], batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(item.input_ids) for item in examples])
    positions = pad_sequence([item.position_ids.T for item in examples], batch_first=True)  # (B, L, 3)
    row_length = input_ids.shape[1]
    return _batch(
        examples,
        offsets=[row * row_length for row in range(len(examples))],
        input_ids=input_ids,
        attention_mask=(torch.arange(row_length) < lengths[:, None]).long(),
        position_ids=positions.permute(2, 0, 1).contiguous(),
        segment_lengths=None,
    )


def collate_packed(examples: Sequence[Example]) -> Batch:
    """One row without padding: `input_ids` (1, L), no mask, `position_ids` (4, 1, L).

    Row 0 of the positions restarts at 0 for every sample: by it transformers keeps the samples apart.
    """
    lengths = [len(item.input_ids) for item in examples]
    starts = torch.cat([torch.arange(length) for length in lengths])
    rotary = torch.cat([item.position_ids for item in examples], dim=1)  # (3, L)
    return _batch(
        examples,
        offsets=list(accumulate(lengths, initial=0))[:-1],
        input_ids=torch.cat([item.input_ids for item in examples])[None],
        attention_mask=None,
        position_ids=torch.cat([starts[None], rotary])[:, None],
        segment_lengths=lengths,
    )


def _batch(
    examples: Sequence[Example],
    offsets: list[int],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    segment_lengths: list[int] | None,
) -> Batch:
    """Adds what both layouts share; `offsets`: where each sample begins in the flattened tokens."""
    supervised = [item.roles.nonzero()[:, 0] for item in examples]
    assert all(int(Role.NONE) == 0 and bool((index > 0).all()) for index in supervised), "no token predicts the first"
    image_ends = list(accumulate(len(item.image_grid_thw) for item in examples))
    solved = [position for position, item in enumerate(examples) if item.has_student_image]
    prompts = [offsets[position] + torch.arange(examples[position].prompt_length) for position in solved]
    pairs = list(zip(examples, supervised, strict=True))
    return Batch(
        samples=[item.sample for item in examples],
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_lengths=segment_lengths,
        label_index=torch.cat([index + offset - 1 for index, offset in zip(supervised, offsets, strict=True)]),
        labels=torch.cat([item.input_ids[index] for item, index in pairs]),
        label_roles=torch.cat([item.roles[index].long() for item, index in pairs]),
        prompt_index=pad_sequence(prompts, batch_first=True, padding_value=-1)
        if prompts
        else torch.empty(0, 0, dtype=torch.int64),
        pixel_patches=torch.cat([item.pixel_patches for item in examples]),
        image_grid_thw=torch.cat([item.image_grid_thw for item in examples]),
        student_images=torch.tensor([image_ends[position] - 1 for position in solved], dtype=torch.int64),
        student_samples=solved,
        targets=[examples[position].target for position in solved],
        noise_seeds=[examples[position].noise_seed for position in solved],
        num_tokens=sum(len(item.input_ids) for item in examples if not item.is_inert),
        num_samples=sum(not item.is_inert for item in examples),
        num_packs=0,
        skipped={},
        loss_counts=None,
    )
