"""Rotary positions of one sample."""

from typing import Any

import pytest
import torch
import transformers
from transformers import Qwen2_5_VLConfig

from recipe.data.encode import rope_positions
from recipe.families import FAMILIES
from recipe.tiny import tiny_config
from tests.support.tiny_cases import token_types


def test_positions_of_text_count_up(hf_config: Qwen2_5_VLConfig):
    positions = rope_positions(torch.tensor([5, 6, 7]), torch.empty(0, 3, dtype=torch.int64), hf_config)
    assert positions.tolist() == [[0, 1, 2]] * 3


def test_positions_around_a_picture_worked_by_hand(hf_config: Qwen2_5_VLConfig):
    start, pad, end = hf_config.vision_start_token_id, hf_config.image_token_id, hf_config.vision_end_token_id
    ids = torch.tensor([9, start, pad, pad, pad, pad, pad, pad, end, 9])
    positions = rope_positions(ids, torch.tensor([[1, 4, 6]]), hf_config)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize("model_type", list(FAMILIES))
@pytest.mark.parametrize("num_teachers", [0, 1, 3])
def test_positions_equal_those_of_a_real_model(encoder, make_sample, num_teachers: int, model_type: str):
    teachers = [make_sample(1 + place, 1, width=50 + 90 * place, height=120) for place in range(num_teachers)]
    example = encoder(make_sample(0, 2), teachers)
    hf_config: Any = tiny_config(encoder.tokenizer, 64, 1, 32, 1, True, model_type)
    model = getattr(transformers, FAMILIES[model_type].base)(hf_config)
    ids: Any = example.input_ids[None]
    types: Any = token_types(model.get_rope_index, ids, hf_config.image_token_id)
    expected, _ = model.get_rope_index(input_ids=ids, image_grid_thw=example.image_grid_thw, **types)
    assert torch.equal(rope_positions(example.input_ids, example.image_grid_thw, hf_config), expected[:, 0])
    assert torch.equal(example.position_ids, expected[:, 0])
