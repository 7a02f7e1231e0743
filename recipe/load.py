"""Load network, processor and configuration of a checkpoint, as prediction and export need them, without Composer."""

import logging
import sys
from collections.abc import Set
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    GenerationConfig,
    PreTrainedModel,
)

from recipe.checkpoints.base import BACKBONE, FINGERPRINT, NETWORK, add_base, frozen_groups
from recipe.checkpoints.weights import (
    CONFIG_FILE,
    HEAD_FILE,
    LANGUAGE_MODEL,
    RUN_CONFIG_FILE,
    answering_weights,
    fill,
    find_base_model,
    find_config,
    is_export,
    is_sharded,
    read_remote_weights,
    read_weights,
)
from recipe.config import ConfigError, ImageConfig, PromptConfig, RecipeConfig, lora_parts
from recipe.configure import load_config
from recipe.data.encode import Encoder
from recipe.data.image import image_spec
from recipe.families import FAMILIES, vision_sizes
from recipe.models.attention import resolve_attention
from recipe.models.caption_decoder import CaptionDecoder
from recipe.models.detection_head import DetectionHead
from recipe.models.lora import adapters, add_adapters, holds_only_adapters, load_adapters, read_base
from recipe.models.memory import MemoryBuilder
from recipe.models.network import AVERAGE, JointNetwork, LanguageNetwork
from recipe.models.nf4 import store_in_nf4
from recipe.models.pyramid import FeaturePyramid
from recipe.models.vlm import PixelNormalizer, VisionLanguageModel, load_vlm, mapped_dtype, read_hf_config
from recipe.optim.groups import group_of
from recipe.redact import redact
from recipe.rules import check_head
from recipe.schema import ImageSpec
from recipe.upstream.trainer_section import view_trainer

log = logging.getLogger(__name__)


def load_processor(name: str) -> Any:
    """Return a checkpoint's tokenizer and fast image processor (not bit-equal to the slow one).

    It equals `AutoProcessor.from_pretrained(name, use_fast=True)`, which takes twice as long: for a line that is never
    logged it writes the whole vocabulary. Nor is there the warning of "an incorrect regex pattern": 4.57 gives it for
    every folder of a large vocabulary that it wrote itself, and means another family (transformers, issue 44031).

    Raises:
        ConfigError: The folder or name holds none, or one that this version of transformers cannot read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, fix_mistral_regex=False)
        images = AutoImageProcessor.from_pretrained(name, use_fast=True)
        class_name = tokenizer.init_kwargs.get("processor_class") or getattr(images, "_processor_class", None)
        if class_name not in {family.processor for family in FAMILIES.values()}:  # neither file has to name it
            return AutoProcessor.from_pretrained(name, use_fast=True, fix_mistral_regex=False)
        processor = getattr(transformers, class_name)
        template = processor.get_processor_dict(name)[0].get("chat_template")
        return processor(images, tokenizer, AutoVideoProcessor.from_pretrained(name), chat_template=template)
    except AttributeError as error:  # transformers 4 on the list of special tokens that 5 writes
        raise ConfigError(
            f"model.pretrained_model_name_or_path={name!r} has a tokenizer that transformers "
            f"{transformers.__version__} cannot read ({error}): save it with that version, or install the one that "
            "wrote it"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a name that the hub does not allow either
        raise ConfigError(
            f"model.pretrained_model_name_or_path is {name!r}, but neither a folder nor the hub has a processor of it: "
            f"give a checkpoint folder or a name on the hub ({str(error).splitlines()[0]})"
        ) from error


def build_encoder(
    processor: Any,
    network: JointNetwork,
    image: ImageConfig,
    prompt: PromptConfig,
    max_seq_len: int,
    keep_image: bool = False,
    with_content: bool = False,
) -> Encoder:
    """Return the encoder of samples into a network's examples.

    Evaluation sets `keep_image` to draw images, training `with_content` if a cache is to find them again.
    """
    return Encoder(
        tokenizer=processor.tokenizer,
        hf_config=network.vlm.hf_model.config,
        image_spec=image_spec(processor.image_processor, image),
        prompt=prompt,
        max_caption_tokens=network.max_caption_tokens or sys.maxsize,
        max_seq_len=max_seq_len,
        keep_image=keep_image,
        with_content=with_content,
    )


def load_base(config: RecipeConfig, name: str | None = None, as_stored: bool = False) -> PreTrainedModel:
    """Load a run's language model, each weight in the precision in which the run stores it.

    Args:
        config: Of the run.
        name: Default: the base's.
        as_stored: Keep the file's own precision where the run's holds all its values, for a model that is sharded
            next: all ranks of a machine then share the file's pages.

    Raises:
        ConfigError: As `load_vlm`.
    """
    settings = {key: value for key, value in vars(config.model).items() if key != "frozen_dtype"}
    settings["pretrained_model_name_or_path"] = name = name or config.model.pretrained_model_name_or_path
    if _rounded_groups(config) >= set(BACKBONE):
        settings["dtype"] = "bfloat16"  # never in float32, which takes twice the memory
    elif as_stored:
        settings["dtype"] = mapped_dtype(name, config.model.dtype)
    vlm = load_vlm(**settings)
    store_frozen(vlm, config)
    return vlm


def store_frozen(vlm: PreTrainedModel, config: RecipeConfig) -> None:
    """Store in bfloat16, or linear layers of the language model in nf4, what no stage trains: `model.frozen_dtype`."""
    rounded = _rounded_groups(config)
    for name, parameter in vlm.named_parameters():
        if group_of(f"hf_model.{name}") in rounded:
            parameter.data = parameter.data.to(torch.bfloat16)
    if config.model.frozen_dtype == "nf4" and "llm" in frozen_groups(config):
        store_in_nf4(vlm.model.language_model)


def _rounded_groups(config: RecipeConfig) -> Set[str]:
    # FSDP keeps a unit's weights in one piece, which has one precision.
    rounds = config.model.dtype == "float32" and config.model.frozen_dtype != "same"
    return frozen_groups(config) if rounds and not view_trainer(config).is_sharded else frozenset()


def build_network(
    config: RecipeConfig, vlm: PreTrainedModel, spec: ImageSpec, max_caption_tokens: int | None = None
) -> JointNetwork:
    """Return the head on top of a language model, whose dimensions are read from its config; it gets its adapters here.

    Without a head if `detection_head` is null.

    The head's weights are float32 at least: the eight bits of a bfloat16 box are too few. So are those of adapters, but
    under FSDP, whose units hold weights of one dtype.

    Raises:
        ConfigError: The head's width, by default the language model's, does not fit its heads; or its switches do not.
        ValueError: The caption length is unknown.
    """
    normalizer = PixelNormalizer(spec.image_mean, spec.image_std)
    model = VisionLanguageModel(vlm, normalizer, config.model.attn_implementation)
    trained = getattr(torch, config.model.dtype)
    dtype = torch.promote_types(trained, torch.float32)
    add_adapters(vlm, lora_parts(config), trained if view_trainer(config).is_sharded else dtype)
    if config.detection_head is None:
        return LanguageNetwork(model)
    hidden_size = vlm.config.get_text_config().hidden_size
    head, decoder = config.detection_head, config.caption_decoder
    width = hidden_size if head.width is None else head.width
    check_head(head, decoder, width)
    max_caption_tokens = max_caption_tokens or decoder.max_caption_tokens
    if max_caption_tokens is None:
        raise ValueError(
            "caption_decoder.max_caption_tokens is null, but only training reads it from the data: give the number "
            f"(a run's is in its {RUN_CONFIG_FILE})"
        )
    return JointNetwork(
        vlm=model,
        memory=MemoryBuilder(
            hidden_size,
            width,
            head.adapter_ratio,
            head.memory_positions,
            FeaturePyramid(hidden_size, vision_sizes(vlm.config)[0], width) if head.multi_scale else None,
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
            multi_scale=head.multi_scale,
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
            max_caption_tokens=max_caption_tokens,
            multi_scale=head.multi_scale,
        ).to(dtype),
        matcher=config.matcher,
        loss=config.loss,
        num_denoising_groups=head.num_denoising_groups,
        box_noise=head.box_noise,
        aux_loss=head.aux_loss,
    )


def load_network(
    checkpoint: str | Path, config: RecipeConfig | None = None, in_nf4: bool = True
) -> tuple[JointNetwork, Any, RecipeConfig]:
    """Return a trained network, its processor and its configuration; averaged weights are used if there are any.

    Args:
        checkpoint: A Composer .pt file, also in an object store, the folder of a sharded checkpoint, or one from
            `export_model`.
        config: Default: the one saved with the checkpoint. For Composer's, only configuration and processor of the base
            model it names are read, not the weights.
        in_nf4: False: what a run stored in nf4 is loaded in bfloat16, and the configuration returned says so.

    Raises:
        ValueError: The checkpoint is missing, is none of these, or does not fit the configuration.
    """
    path = Path(checkpoint)
    if path.is_dir() and not is_sharded(path):
        return _load_exported(path, config)
    if "://" in str(checkpoint):
        if config is None:
            raise ValueError(f"{checkpoint} is in a store, its run's {RUN_CONFIG_FILE} is not: give --config YAML")
        base, weights = config.model.pretrained_model_name_or_path, read_remote_weights(str(checkpoint))
    else:
        weights, given = read_weights(path), config
        config = given or find_config(path)
        base = config.model.pretrained_model_name_or_path
        base = base if given else find_base_model(base, path)
    if not in_nf4 and config.model.frozen_dtype == "nf4":
        log.info("the run stored its base model in nf4, and what it trained now joins the base in bfloat16")
        config = replace(config, model=replace(config.model, frozen_dtype="bfloat16"))
    processor, weights = load_processor(base), answering_weights(weights, NETWORK)
    length = _trained_length(config, weights, NETWORK)
    spec = image_spec(processor.image_processor, config.image)
    vlm = load_base(config, base) if FINGERPRINT in weights else _unread_vlm(base, config)
    with no_init_weights():  # of what is read next
        network = build_network(config, vlm, spec, length)
    _fill_from_checkpoint(network, weights, checkpoint)
    return network, processor, config


def _load_exported(folder: Path, config: RecipeConfig | None) -> tuple[JointNetwork, Any, RecipeConfig]:
    missing = [name for name in (CONFIG_FILE, HEAD_FILE) if not (folder / name).is_file()]
    if missing:
        within = [*folder.glob("*"), *folder.glob("checkpoints/*")]
        found = sorted(str(path) for path in within if path.suffix == ".pt" or is_sharded(path))
        remedy = f"give one of its checkpoints, such as {found[-1]}" if found else "make one with recipe/export.py"
        raise ValueError(f"{folder} is not an exported model, it lacks {' and '.join(missing)}: {remedy}")
    config, base = config or load_config(str(folder / CONFIG_FILE)), read_base(folder)
    if base is None:
        config, source = replace(config, lora=None), str(folder)  # adapters are merged
    else:
        source = find_base_model(base, folder / CONFIG_FILE)
    weights, processor = load_file(folder / HEAD_FILE), load_processor(str(folder))
    vlm = load_base(config, source)
    spec = image_spec(processor.image_processor, config.image)
    with no_init_weights():  # of what is read next
        network = build_network(config, vlm, spec, _trained_length(config, weights))
    if base is not None:
        load_adapters(vlm, folder)
    fill_head(network, folder, weights)
    return network, processor, config


def fill_head(network: JointNetwork, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Load all but the language model from an export, or its `weights`; raise ValueError if they do not fit.

    An export holds no averages; they begin as its weights.
    """
    weights = weights or load_file(folder / HEAD_FILE)
    averaged = {name.removeprefix(AVERAGE) for name in network.state_dict() if name.startswith(AVERAGE)}
    weights |= {AVERAGE + name: weights[name] for name in averaged & weights.keys()}
    head = nn.ModuleDict({name: part for name, part in network.named_children() if f"{name}." != LANGUAGE_MODEL})
    fill(head, weights, folder / HEAD_FILE)


def fill_whole(network: JointNetwork, path: str, config: RecipeConfig) -> bool:
    """Load all weights of a checkpoint, also in an object store, or an export.

    An export of adapters leaves the base as it is: that of `config`.

    Returns:
        Whether it holds any weight that the run does not train, which need not be its base's then.

    Raises:
        ValueError: It does not fit.
        ConfigError: It holds weights that the run stores in nf4.
    """
    frozen = frozen_groups(config)
    hf_model, base = network.vlm.hf_model, read_base(path)
    if base is not None:
        name = config.model.pretrained_model_name_or_path
        if Path(base).name != Path(name).name:
            log.warning("load_path=%s holds adapters of %s, which are now put on %s", path, base, name)
        load_adapters(hf_model, Path(path))
        fill_head(network, Path(path))
        return "merger" in frozen and not holds_only_adapters(path)
    elif is_export(path):
        if adapters(hf_model):
            raise ConfigError(
                f"load_path={path} is a whole model, which begins with new adapters only as the base: set "
                f"model.pretrained_model_name_or_path={path} and leave load_path out; or set lora=null"
            )
        hf_model.load_state_dict(load_base(config, path).state_dict())
        fill_head(network, Path(path))
        return bool(frozen)
    weights = read_remote_weights(path) if "://" in path else read_weights(path)
    held = {name for name in weights if name.startswith(f"{NETWORK}{LANGUAGE_MODEL}") and group_of(name) in frozen}
    if held:
        refuse_in_nf4(config, path)
    _fill_from_checkpoint(network, weights, redact(path))
    return bool(held)


def refuse_in_nf4(config: RecipeConfig, path: str) -> None:
    """Raise ConfigError if a run stores in nf4 what `path` holds: a checkpoint's base could not be found again."""
    if config.model.frozen_dtype == "nf4":
        raise ConfigError(
            f"load_path={redact(path)} holds weights that the run does not train, but nf4 is stored from a base model: "
            "set model.pretrained_model_name_or_path to an export of it, or model.frozen_dtype=bfloat16"
        )


def _fill_from_checkpoint(network: JointNetwork, weights: dict[str, torch.Tensor], source: str | Path) -> None:
    add_base(network, weights, source)
    fill(nn.ModuleDict({NETWORK.removesuffix("."): network}), weights, Path(source))


def _trained_length(config: RecipeConfig, weights: dict[str, torch.Tensor], prefix: str = "") -> int | None:
    """Return `max_caption_tokens`; if it is null, the number of positions in the weights."""
    positions = weights.get(f"{prefix}caption_decoder.token_positions.weight")
    return config.caption_decoder.max_caption_tokens or (None if positions is None else len(positions))


def _unread_vlm(name: str, config: RecipeConfig) -> PreTrainedModel:
    """Return the language model with uninitialized weights, to be filled from the checkpoint."""
    with no_init_weights():
        vlm = AutoModelForImageTextToText.from_config(
            read_hf_config(name),
            attn_implementation=resolve_attention(config.model.attn_implementation),
            dtype=getattr(torch, config.model.dtype),
        )
    vlm.tie_weights()
    store_frozen(vlm, config)
    with suppress(OSError):  # the file is optional
        vlm.generation_config = GenerationConfig.from_pretrained(name)
    return vlm


def drop_ineffective_flags(generation: GenerationConfig) -> list[str]:
    """Remove the flags of a generation config that have no effect, with which it cannot be saved; return their names.

    Raises:
        ConfigError: It is wrong in another way.
    """
    dropped: list[str] = []
    sampling = ["temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"]
    flags = [] if generation.do_sample else sampling
    is_one_beam = generation.num_beams in (None, 1)  # None: not set, in transformers 5
    flags += ["early_stopping", "length_penalty"] if is_one_beam else []
    flags += [] if generation.do_sample or not is_one_beam else ["num_return_sequences"]
    flags += [] if generation.return_dict_in_generate else [*generation.extra_output_flags]
    defaults = GenerationConfig()
    for flag in flags:
        if getattr(generation, flag, None) not in (None, value := getattr(defaults, flag, None)):
            setattr(generation, flag, value)
            dropped.append(flag)
    try:
        generation.validate(strict=True)
    except ValueError as error:
        raise ConfigError(f"the base model's generation_config.json is wrong: {str(error).splitlines()[0]}") from error
    return dropped


try:
    from transformers.initialization import no_init_weights  # type: ignore[import-not-found]  # since transformers 5
except ImportError:
    from transformers.modeling_utils import no_init_weights
