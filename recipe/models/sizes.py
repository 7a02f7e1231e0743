"""The published sizes of Qwen2.5-VL, to build a model's shapes where neither hub nor checkpoint is at hand."""

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2_5_VLConfig

_TEXT: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def model_config(pretrained_model_name_or_path: str) -> Qwen2_5_VLConfig:
    """The configuration of a published size, or of a checkpoint folder or other name.

    Raises:
        ValueError: It is none of these.
    """
    text = _TEXT.get(pretrained_model_name_or_path)
    if text is None:
        try:
            return Qwen2_5_VLConfig.from_pretrained(pretrained_model_name_or_path)
        except OSError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} is neither a folder nor a reachable name: give a checkpoint folder "
                f"or one of {', '.join(_TEXT)}"
            ) from error
    return Qwen2_5_VLConfig(
        text_config={
            **text,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "use_sliding_window": False,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "out_hidden_size": text["hidden_size"],
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
        tie_word_embeddings=text["tie_word_embeddings"],
    )
