"""Rotary positions of one sample, by transformers' own rule, without a model."""

from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLModel


def rope_positions(input_ids: Tensor, image_grid_thw: Tensor, hf_config: Any) -> Tensor:
    """(3, L) int64 positions along time, height and width, from 0.

    Args:
        input_ids: (L,) int64 of one sample.
        image_grid_thw: (I, 3) int64 of its images; I may be 0.
        hf_config: The checkpoint's configuration.
    """
    # get_rope_index reads nothing of the model but its config, and in transformers 5 a method that reads nothing of it.
    kind: Any = Qwen2_5_VLModel
    model = SimpleNamespace(config=hf_config)
    arguments = {"input_ids": input_ids[None], "image_grid_thw": image_grid_thw if len(image_grid_thw) else None}
    if "mm_token_type_ids" in signature(kind.get_rope_index).parameters:
        model.get_vision_position_ids = partial(kind.get_vision_position_ids, None)
        arguments["mm_token_type_ids"] = (input_ids[None] == hf_config.image_token_id).int()  # 1: of a picture
    positions, _ = kind.get_rope_index(model, **arguments)
    return positions[:, 0].clone()
