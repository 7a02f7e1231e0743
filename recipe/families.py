"""What differs between the model families, by the `model_type` of a checkpoint's config.

Classes and modules are given by their names in transformers, which is not imported here. A run reads all sizes from its
checkpoint's config; those of the published ones are here for `recipe.estimate`, which loads nothing.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from recipe.config import ConfigError, PromptConfig


@dataclass(frozen=True)
class Family:
    """Names and conventions that all checkpoints of a family share.

    Attributes:
        title: In messages.
        model: Class with the language head.
        base: Class without it, whose `get_rope_index` gives positions.
        config: Class of the configuration.
        processor: Class of tokenizer and image processor together.
        units: Classes of a block of the vision tower and of a layer of the language model: FSDP shards each.
        mergers: Modules of the vision tower whose results have the language model's width: the group `merger`.
        merger_norm: The first module of a merger.
        lora_targets: Linear layers in every block of a part that may get adapters.
        vision_width: Key of the vision config for the width of the tower.
        output_width: Key of the vision config for the width after the merger.
        patch_size: Pixels, in all published checkpoints, as are the next two.
        image_mean: Per channel, of values in [0, 1].
        image_std: Per channel, of values in [0, 1].
        feed_forward_rows: What a vision block keeps for its backward pass, in rows of its feed-forward network's width.
        has_windows: Most vision blocks attend within windows, in whose order the tower keeps the patches.
        has_deepstack: Features of earlier vision blocks are added to what the first language layers compute.
        normalizes_heads: Queries and keys have norms of their own in the language model.
        box_coordinates: As `prompt.box_coordinates`: how the base models were trained to write boxes.
        text: Of the text config of all published checkpoints.
    """

    title: str
    model: str
    base: str
    config: str
    processor: str
    units: tuple[str, str]
    mergers: tuple[str, ...]
    merger_norm: str
    lora_targets: Mapping[str, tuple[str, ...]]
    vision_width: str
    output_width: str
    patch_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    feed_forward_rows: int
    has_windows: bool
    has_deepstack: bool
    normalizes_heads: bool
    box_coordinates: str
    text: Mapping[str, Any]


_OPENAI = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_MROPE = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "use_sliding_window": False,
}
_LANGUAGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

FAMILIES: Mapping[str, Family] = {
    "qwen2_vl": Family(
        title="Qwen2-VL",
        model="Qwen2VLForConditionalGeneration",
        base="Qwen2VLModel",
        config="Qwen2VLConfig",
        processor="Qwen2VLProcessor",
        units=("Qwen2VLVisionBlock", "Qwen2VLDecoderLayer"),
        mergers=("merger",),
        merger_norm="ln_q",
        lora_targets={"llm": _LANGUAGE_TARGETS, "vision": ("qkv", "proj", "fc1", "fc2")},
        vision_width="embed_dim",
        output_width="hidden_size",
        patch_size=14,
        **_OPENAI,
        feed_forward_rows=3,
        has_windows=False,
        has_deepstack=False,
        normalizes_heads=False,
        box_coordinates="normalized_1000",
        text={"max_position_embeddings": 32768, **_MROPE},
    ),
    "qwen2_5_vl": Family(
        title="Qwen2.5-VL",
        model="Qwen2_5_VLForConditionalGeneration",
        base="Qwen2_5_VLModel",
        config="Qwen2_5_VLConfig",
        processor="Qwen2_5_VLProcessor",
        units=("Qwen2_5_VLVisionBlock", "Qwen2_5_VLDecoderLayer"),
        mergers=("merger",),
        merger_norm="ln_q",
        lora_targets={"llm": _LANGUAGE_TARGETS, "vision": ("qkv", "proj", "gate_proj", "up_proj", "down_proj")},
        vision_width="hidden_size",
        output_width="out_hidden_size",
        patch_size=14,
        **_OPENAI,
        feed_forward_rows=4,
        has_windows=True,
        has_deepstack=False,
        normalizes_heads=False,
        box_coordinates="absolute",
        text={"max_position_embeddings": 128000, **_MROPE},
    ),
    "qwen3_vl": Family(
        title="Qwen3-VL",
        model="Qwen3VLForConditionalGeneration",
        base="Qwen3VLModel",
        config="Qwen3VLConfig",
        processor="Qwen3VLProcessor",
        units=("Qwen3VLVisionBlock", "Qwen3VLTextDecoderLayer"),
        mergers=("merger", "deepstack_merger_list"),
        merger_norm="norm",
        lora_targets={"llm": _LANGUAGE_TARGETS, "vision": ("qkv", "proj", "linear_fc1", "linear_fc2")},
        vision_width="hidden_size",
        output_width="out_hidden_size",
        patch_size=16,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        feed_forward_rows=2,
        has_windows=False,
        has_deepstack=True,
        normalizes_heads=True,
        box_coordinates="normalized_1000",
        text={
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5e6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
            "head_dim": 128,
        },
    ),
}
MERGERS = sorted({merger for family in FAMILIES.values() for merger in family.mergers})
LORA_TARGETS = {  # of any family
    part: tuple(dict.fromkeys(target for family in FAMILIES.values() for target in family.lora_targets[part]))
    for part in ("llm", "vision")
}
_WHY_NOT = {
    "qwen2_5_omni": "it also hears",
    "qwen3_5": "its linear attention mixes the samples of a pack",
    "qwen3_vl_moe": "nothing here trains a router of experts",
}


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_VISION_2 = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}
_VISION_2_5 = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
_VISION_3 = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
_VISION_3_LARGE = {
    **_VISION_3,
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
PUBLISHED: Mapping[str, tuple[str, tuple[int, ...], int, bool, Mapping[str, Any]]] = {
    # model type, sizes as above, vocab_size, tie_word_embeddings, vision config
    "Qwen/Qwen2-VL-2B-Instruct": ("qwen2_vl", (1536, 8960, 28, 12, 2), 151936, True, _VISION_2),
    "Qwen/Qwen2-VL-7B-Instruct": ("qwen2_vl", (3584, 18944, 28, 28, 4), 152064, False, _VISION_2),
    "Qwen/Qwen2.5-VL-3B-Instruct": ("qwen2_5_vl", (2048, 11008, 36, 16, 2), 151936, True, _VISION_2_5),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", (3584, 18944, 28, 28, 4), 152064, False, _VISION_2_5),
    "Qwen/Qwen3-VL-2B-Instruct": ("qwen3_vl", (2048, 6144, 28, 16, 8), 151936, True, _VISION_3),
    "Qwen/Qwen3-VL-4B-Instruct": ("qwen3_vl", (2560, 9728, 36, 32, 8), 151936, True, _VISION_3),
    "Qwen/Qwen3-VL-8B-Instruct": ("qwen3_vl", (4096, 12288, 36, 32, 8), 151936, False, _VISION_3_LARGE),
}


def published_config(name: str) -> tuple[Family, dict[str, Any]]:
    """Return the family of a published checkpoint and the keywords of its configuration; KeyError for another name."""
    model_type, sizes, vocab_size, is_tied, vision = PUBLISHED[name]
    family = FAMILIES[model_type]
    text = {
        **dict(zip(_SIZES, sizes, strict=True)),
        "vocab_size": vocab_size,
        "tie_word_embeddings": is_tied,
        **deepcopy(family.text),
    }
    shape = {"patch_size": family.patch_size, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision = {**deepcopy(vision), **shape, family.output_width: sizes[0]}
    return family, {"text_config": text, "vision_config": vision, "tie_word_embeddings": is_tied}


def family_named(model_type: str | None, name: str) -> Family:
    """Return the family of a `model_type`; raise ConfigError if it is not supported. `name` is the checkpoint's."""
    family = FAMILIES.get(str(model_type))
    if family is None:
        reason = f" ({_WHY_NOT[str(model_type)]})" if model_type in _WHY_NOT else ""
        supported = ", ".join(f"{family.title} ({key})" for key, family in FAMILIES.items())
        raise ConfigError(
            f"model.pretrained_model_name_or_path={name!r} is of the model type {model_type}{reason}: give a "
            f"checkpoint of {supported}"
        )
    return family


def family_of(hf_config: Any) -> Family:
    """Return the family of a checkpoint's config."""
    return family_named(hf_config.model_type, getattr(hf_config, "name_or_path", ""))


def vision_sizes(hf_config: Any) -> tuple[int, int]:
    """Return the width of the vision tower and that of its feed-forward network."""
    vision = hf_config.vision_config
    width = getattr(vision, family_of(hf_config).vision_width)
    return width, getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)


def box_coordinates(prompt: PromptConfig, hf_config: Any) -> str:
    """Return `prompt.box_coordinates`; if it is null, what the base model was trained with (`absolute` without one)."""
    if prompt.box_coordinates is not None or hf_config is None:
        return prompt.box_coordinates or "absolute"
    return family_of(hf_config).box_coordinates
