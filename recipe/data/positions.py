"""Rotary positions of one sample, by transformers' own rule, without a model."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Qwen2_5_VLModel


def rope_positions(input_ids: Tensor, image_grid_thw: Tensor, hf_config: Any) -> Tensor:
    """(3, L) int64 positions along time, height and width, from 0.

    Args:
        input_ids: (L,) int64 of one sample.
        image_grid_thw: (I, 3) int64 of its images; I may be 0.
        hf_config: The checkpoint's configuration.
    """
    # get_rope_index reads nothing of the model but its config.
    model = cast(Qwen2_5_VLModel, SimpleNamespace(config=hf_config))
    grids = cast(torch.LongTensor, image_grid_thw) if len(image_grid_thw) else None
    positions, _ = Qwen2_5_VLModel.get_rope_index(model, cast(torch.LongTensor, input_ids[None]), grids)
    return positions[:, 0].clone()
