"""Configuration → model, processor and encoder."""

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recipe.algorithms.head_ema import HeadEMA
from recipe.algorithms.nan_rollback import NaNRollback
from recipe.algorithms.staged_freezing import StagedFreezing
from recipe.checkpoints.weights import (
    CONFIG_FILE,
    HEAD_FILE,
    LANGUAGE_MODEL,
    RUN_CONFIG_FILE,
    answering_weights,
    fill,
    find_config,
    read_remote_weights,
    read_weights,
    with_trained_caption_length,
)
from recipe.config import ConfigError, ModelConfig, RecipeConfig
from recipe.configure import load_config
from recipe.data.encode import Encoder
from recipe.data.image import image_spec
from recipe.data.lengths import read_longest_caption
from recipe.joint import JointModel
from recipe.models.caption_decoder import CaptionDecoder
from recipe.models.detection_head import DetectionHead
from recipe.models.memory import MemoryBuilder
from recipe.models.network import JointNetwork
from recipe.models.vlm import PixelNormalizer, VisionLanguageModel, load_vlm, resolve_attention
from recipe.optim.schedule import build_schedule
from recipe.schema import ImageSpec
from recipe.upstream.storage import open_streams

log = logging.getLogger(__name__)


def load_processor(config: RecipeConfig) -> Any:
    """The checkpoint's tokenizer and image processor; the fast image processor, whose numbers differ from the slow's.

    Raises:
        ValueError: The folder or name holds none.
    """
    name = config.model.pretrained_model_name_or_path
    try:
        return AutoProcessor.from_pretrained(name, use_fast=True)
    except (OSError, ValueError) as error:  # ValueError: a name that is no name on the hub either
        raise ValueError(
            f"model.pretrained_model_name_or_path={name!r} holds no processor ({str(error).splitlines()[0]}): "
            "give a checkpoint folder or a name on the hub"
        ) from error


def with_caption_length(config: RecipeConfig, tokenizer: PreTrainedTokenizerBase) -> RecipeConfig:
    """The configuration with `max_caption_tokens` as the data ask for, where it is null; called by all ranks.

    The captions of the evaluation set count too: one that is too long would end the first evaluation.

    Raises:
        ValueError: A stream cannot be opened, or has no records.
    """
    decoder = config.caption_decoder
    if decoder.max_caption_tokens is not None:
        return config
    streams = [*open_streams(config.train_loader.streams), *open_streams(config.eval_loader.streams)]
    longest = max(read_longest_caption(streams, tokenizer), 2)
    log.info("caption_decoder.max_caption_tokens: %d, as long as the longest caption of the data", longest)
    return replace(config, caption_decoder=replace(decoder, max_caption_tokens=longest))


def _caption_length(config: RecipeConfig) -> int:
    length = config.caption_decoder.max_caption_tokens
    if length is None:
        raise ValueError(
            "caption_decoder.max_caption_tokens is null, for which only training looks into the data: give the number, "
            "of a run the one in its config.yaml"
        )
    return length


def build_encoder(config: RecipeConfig, processor: Any, keep_image: bool = False) -> Encoder:
    """What turns samples into examples; `keep_image` for evaluation, which draws them."""
    return Encoder(
        tokenizer=processor.tokenizer,
        hf_config=AutoConfig.from_pretrained(config.model.pretrained_model_name_or_path),
        image_spec=image_spec(processor.image_processor, config.image),
        prompt=config.prompt,
        max_caption_tokens=_caption_length(config),
        max_seq_len=config.max_seq_len,
        keep_image=keep_image,
    )


def build_model(config: RecipeConfig, processor: Any) -> JointModel:
    """The joint model, its language model loaded from the checkpoint; with averages where `ema` asks for them."""
    vlm = load_vlm(
        config.model.pretrained_model_name_or_path,
        config.model.attn_implementation,
        config.model.dtype,
        config.model.gradient_checkpointing,
    )
    network = build_network(config, vlm, image_spec(processor.image_processor, config.image))
    if config.ema is not None:
        network.add_average()
    return JointModel(network, processor.tokenizer, config.loss, config.evaluation, config.prompt)


def check_width(width: int, config: RecipeConfig) -> None:
    """Whether a head can be so wide.

    Raises:
        ConfigError: It is no multiple of the attention heads, or of 8: sine and cosine of four coordinates.
    """
    divisors = {
        f"detection_head.num_heads {config.detection_head.num_heads}": config.detection_head.num_heads,
        f"caption_decoder.num_heads {config.caption_decoder.num_heads}": config.caption_decoder.num_heads,
        "8, as the positions of boxes need": 8,
    }
    for name, divisor in divisors.items():
        if width % divisor:
            raise ConfigError(
                f"detection_head.width {width} is no multiple of {name}; null is the language model's width"
            )


def build_network(config: RecipeConfig, vlm: PreTrainedModel, spec: ImageSpec) -> JointNetwork:
    """The head on top of a language model; every dimension of the latter is read from its config.

    The head's weights are kept in float32 at least: eight bits of a bfloat16 box are too few.

    Raises:
        ConfigError: The language model's width, which is the head's where it has none, does not suit it.
    """
    dtype = torch.promote_types(vlm.dtype, torch.float32)
    hidden_size = vlm.config.get_text_config().hidden_size
    head, decoder = config.detection_head, config.caption_decoder
    width = hidden_size if head.width is None else head.width
    check_width(width, config)
    return JointNetwork(
        vlm=VisionLanguageModel(vlm, PixelNormalizer(spec.image_mean, spec.image_std)),
        memory=MemoryBuilder(
            hidden_size,
            width,
            head.adapter_ratio,
            head.memory_positions,
            vlm.config.vision_config.hidden_size if head.patch_features else None,
        ).to(dtype),
        detection_head=DetectionHead(
            width=width,
            num_queries=head.num_queries,
            num_heads=head.num_heads,
            num_layers=head.num_layers,
            ffn_factor=head.ffn_factor,
            dropout=head.dropout,
            refine_boxes=head.refine_boxes,
            local_attention=head.local_attention,
            select_queries=head.select_queries,
            num_query_groups=head.num_query_groups,
        ).to(dtype),
        caption_decoder=CaptionDecoder(
            hidden_size=hidden_size,
            width=width,
            num_heads=decoder.num_heads,
            num_layers=decoder.num_layers,
            ffn_factor=decoder.ffn_factor,
            dropout=decoder.dropout,
            max_caption_tokens=_caption_length(config),
            own_vocab_size=None if decoder.tie_word_embeddings else vlm.config.get_text_config().vocab_size,
        ).to(dtype),
        matcher=config.matcher,
        loss=config.loss,
        num_denoising_groups=head.num_denoising_groups,
        box_noise=head.box_noise,
        aux_loss=head.aux_loss,
    )


def build_algorithms(config: RecipeConfig) -> list[Algorithm]:
    """Stages and learning rates; the average of the weights; then the guard that also clips.

    Composer calls the last one first after the backward pass, and last at the end of a batch.
    """
    return [
        StagedFreezing(build_schedule(config)),
        *([] if config.ema is None else [HeadEMA(config.ema)]),
        NaNRollback(config.nan_rollback, config.optimizer.clip_norm, config.run_folder),
    ]


def load_model(checkpoint: str | Path, config: RecipeConfig | None = None) -> tuple[JointModel, Any, RecipeConfig]:
    """Loads a trained model, its processor and its configuration; where it has averaged weights, those.

    Args:
        checkpoint: A Composer .pt file, also in an object store, or a folder from `export_model`.
        config: Default: what was saved with the checkpoint. For a .pt file it names the folder or hub name of the base
            model, of which the configuration and the processor are read, not the weights.

    Raises:
        ValueError: The checkpoint is missing, is neither of the two, or does not fit the configuration.
    """
    path = Path(checkpoint)
    if config is not None:
        config = with_trained_caption_length(config, checkpoint)
    if path.is_dir():
        return _load_exported(path, config)
    if "://" in str(checkpoint):
        if config is None:
            raise ValueError(f"{checkpoint} lies in a store, its run's {RUN_CONFIG_FILE} does not: give --config YAML")
        weights = read_remote_weights(str(checkpoint))
    else:
        weights = read_weights(path)
        config = config or find_config(path)
    processor = load_processor(config)
    network = build_network(config, _unread_vlm(config.model), image_spec(processor.image_processor, config.image))
    model = JointModel(network, processor.tokenizer, config.loss, config.evaluation, config.prompt)
    fill(model, answering_weights(weights, "model."), path)
    return model, processor, config


def _load_exported(folder: Path, config: RecipeConfig | None) -> tuple[JointModel, Any, RecipeConfig]:
    missing = [name for name in (CONFIG_FILE, HEAD_FILE) if not (folder / name).is_file()]
    if missing:
        found = sorted(str(path) for path in [*folder.glob("*.pt"), *folder.glob("checkpoints/*.pt")])
        remedy = f"give one of its checkpoints, such as {found[-1]}" if found else "make one with recipe/export.py"
        raise ValueError(f"{folder} is no exported model, it lacks {' and '.join(missing)}: {remedy}")
    config = config or load_config(str(folder / CONFIG_FILE))
    # What is exported are the averages.
    config = replace(config, model=replace(config.model, pretrained_model_name_or_path=str(folder)), ema=None)
    processor = load_processor(config)
    model = build_model(config, processor)
    head = nn.ModuleDict({name: part for name, part in model.model.named_children() if f"{name}." != LANGUAGE_MODEL})
    fill(head, load_file(folder / HEAD_FILE), folder / HEAD_FILE)
    return model, processor, config


def _unread_vlm(config: ModelConfig) -> PreTrainedModel:
    """The language model with the memory for its weights, but nothing read into it."""
    name = config.pretrained_model_name_or_path
    with no_init_weights():
        vlm = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(name),
            attn_implementation=resolve_attention(config.attn_implementation),
            dtype=getattr(torch, config.dtype),
        )
    vlm.tie_weights()
    with suppress(OSError):  # the file is optional
        vlm.generation_config = GenerationConfig.from_pretrained(name)
    return vlm


try:
    from transformers.initialization import no_init_weights  # type: ignore[import-not-found]  # since transformers 5
except ImportError:
    from transformers.modeling_utils import no_init_weights
