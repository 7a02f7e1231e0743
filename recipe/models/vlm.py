"""The language model: a Qwen-VL through `from_pretrained`, vision features computed once and shared with the head."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Float, Float32, Int, Int64, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from recipe.config import ConfigError
from recipe.families import family_named, family_of
from recipe.models.attention import PACKED, WindowAttention, resolve_attention
from recipe.models.token_losses import token_losses
from recipe.models.vision_grids import rotary_angles, window_order, windows_of_images

log = logging.getLogger(__name__)

SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16"}
IS_TRANSFORMERS_4 = transformers.__version__.startswith("4.")


@dataclass
class VlmOutputs:
    """Hidden states and vision features of one batch; letters as in `recipe.schema`.

    Attributes:
        last_hidden_state: Of the B * L tokens, after the final norm.
        image_features: Of each image's tokens in raster order, after the merger.
        patch_features: Before it, each token's merge² patches in raster order, C the vision tower's width; empty if not
            requested.
    """

    last_hidden_state: Float[Tensor, "all_tokens D"]
    image_features: tuple[Float[Tensor, "_ D"], ...]
    patch_features: tuple[Float[Tensor, "_ patches C"], ...]


class PixelNormalizer(nn.Module):
    """Compute the `pixel_values` of Hugging Face's image processor on the device, for one of the equal frames.

    `image_mean` and `image_std` are per channel, of values in [0, 1].
    """

    def __init__(self, image_mean: Sequence[float], image_std: Sequence[float]):
        super().__init__()
        # Rescaling is folded in as the fast processor does: (x - 255 mean) / (255 std), in float32.
        self.register_buffer("mean", torch.tensor(image_mean).mul(255.0).view(1, -1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_std).mul(255.0).view(1, -1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, pixel_patches: UInt8[Tensor, "P values"]) -> Float32[Tensor, "P values"]:
        """Return patches of 3 * patch * patch values, normalized."""
        pixels = pixel_patches.view(len(pixel_patches), self.mean.shape[1], -1).to(self.mean.dtype, copy=True)
        # In place: new memory costs a CPU more than the arithmetic.
        return pixels.sub_(self.mean).div_(self.std).flatten(1)


class ImageEmbedding(nn.Module):
    """Qwen's patch embedding of images: one matrix product with the sum of the frames' weights, and any bias.

    Qwen's is a convolution over video frames, and an image is a video of equal frames. Summed weights give the same at
    half the cost, and a convolution whose stride equals its kernel is slower than the equivalent product. Hugging
    Face's weights keep their place and name.
    """

    def __init__(self, patch_embed: nn.Module):
        super().__init__()
        self.proj: Any = patch_embed.proj

    def forward(self, pixel_values: Float[Tensor, "P values"]) -> Float[Tensor, "P C"]:
        """Embed patches of one frame."""
        weight: Tensor = self.proj.weight.sum(2)  # (C, 3, frames, patch, patch) → (C, 3, patch, patch)
        return F.linear(pixel_values.to(weight.dtype), weight.flatten(1), self.proj.bias)


class VisionLanguageModel(nn.Module):
    """A model of transformers, one pass of which gives hidden states and the image features they read.

    Its patch embedding is replaced by an `ImageEmbedding`, and with the attention `packed_sdpa` that of its vision
    tower by `WindowAttention`.
    """

    def __init__(self, hf_model: PreTrainedModel, normalizer: PixelNormalizer, attention: str = "auto"):
        super().__init__()
        visual: Any = hf_model.model.visual
        visual.patch_embed = ImageEmbedding(visual.patch_embed)
        self.family = family_of(hf_model.config)
        if hasattr(visual, "get_window_index"):  # transformers 4
            merge = visual.spatial_merge_size
            side = visual.window_size // merge // visual.patch_size
            visual.get_window_index = partial(windows_of_images, merge=merge, side=side)
            visual.rot_pos_emb = partial(rotary_angles, visual.rotary_pos_emb, merge=merge)
        for part in (module for module in visual.modules() if type(module) is type(visual.merger)):
            part.register_forward_pre_hook(partial(_to_its_dtype, self.family.merger_norm))
        if resolve_attention(attention) == PACKED:
            for block in visual.blocks:
                block.attn = WindowAttention(block.attn)
        self.hf_model = hf_model
        self.normalizer = normalizer

    @property
    def text_config(self) -> Any:
        """Return the language model's part of the checkpoint's config."""
        return self.hf_model.config.get_text_config()

    @property
    def embed_tokens(self) -> nn.Module:
        """Return the token embedding, shared with the caption decoder."""
        return self.hf_model.get_input_embeddings()

    def image_features(
        self, pixel_patches: UInt8[Tensor, "P values"], image_grid_thw: Int64[Tensor, "I 3"], with_patches: bool = False
    ) -> tuple[
        tuple[Float[Tensor, "_ D"], ...], tuple[Float[Tensor, "_ patches C"], ...], list[Float[Tensor, "tokens D"]]
    ]:
        """Return the vision features of every image's tokens: after the merger, before it, and of earlier blocks.

        The second part is empty unless `with_patches`. The third has one tensor, of all images' tokens, for each of the
        first language layers to whose result it is added; it is empty in families without deepstack.
        """
        pixel_values = self.normalizer(pixel_patches).to(self.hf_model.dtype)
        visual = self.hf_model.model.visual
        # Read before the tower's pass is queued, or the host would wait for it.
        order = None
        if with_patches and self.family.has_windows:
            order = window_order(visual, image_grid_thw.cpu())
        merged: list[Tensor] = []
        hook = visual.merger.register_forward_pre_hook(lambda _, inputs: merged.append(inputs[0]))
        try:
            found = self.hf_model.model.get_image_features(pixel_values, image_grid_thw)
        finally:
            hook.remove()
        deepstack: list[Tensor] = []
        if hasattr(found, "pooler_output"):  # transformers 5
            found, deepstack = found.pooler_output, getattr(found, "deepstack_features", [])
        elif self.family.has_deepstack:
            found, deepstack = found
        features = tuple(found)
        # One tensor per image since transformers 5.18.
        deepstack = [taps if isinstance(taps, Tensor) else torch.cat(list(taps)) for taps in deepstack]
        if not with_patches:
            return features, (), deepstack
        patches = merged[0].unflatten(0, (-1, visual.spatial_merge_size**2))
        if order is not None:
            patches = patches[order.argsort().to(patches.device)]
        return features, patches.split([len(tokens) for tokens in features]), deepstack

    def forward(
        self,
        input_ids: Int64[Tensor, "B L"],
        attention_mask: Int64[Tensor, "B L"] | None,
        position_ids: Int64[Tensor, "_ _ _"],
        segment_lengths: list[int] | None,
        pixel_patches: UInt8[Tensor, "P values"],
        image_grid_thw: Int64[Tensor, "I 3"],
        with_patches: bool = False,
    ) -> VlmOutputs:
        """Run the vision tower once and the language model over its features.

        The arguments are fields of `recipe.schema.Batch`; `with_patches` requests the features before the merger too.

        Raises:
            ValueError: `input_ids` hold more or fewer image placeholders than there are vision tokens.
        """
        check_packing_contract(input_ids, attention_mask, position_ids, segment_lengths)
        inputs_embeds, early = self.embed_tokens(input_ids), dict[str, Any]()
        if len(image_grid_thw):
            features, patch_features, deepstack = self.image_features(pixel_patches, image_grid_thw, with_patches)
            flat = torch.cat(features).to(inputs_embeds.dtype)
            image_mask = input_ids == self.hf_model.config.image_token_id
            inputs_embeds = scatter_features(inputs_embeds, image_mask, flat)
            if deepstack:  # what the first layers add to their results
                early = {"visual_pos_masks": image_mask, "deepstack_visual_embeds": deepstack}
        else:
            # Every rank must run the vision tower in every step, or DDP and FSDP wait indefinitely.
            features, patch_features = (), ()
            (blank,), _, deepstack = self.image_features(*self.blank_image(input_ids.device))
            inputs_embeds = inputs_embeds + 0.0 * sum(part.sum() for part in (blank, *deepstack))
        packing: dict[str, Any] = {}  # how attention functions separate the samples of a packed row
        if segment_lengths is not None:
            ends = torch.tensor([0, *accumulate(segment_lengths)], dtype=torch.int32, device=input_ids.device)
            packing = {"segment_lengths": segment_lengths, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            packing |= dict.fromkeys(("max_length_q", "max_length_k"), max(segment_lengths))
        if len(position_ids) == 3:
            # transformers finds packed rows by the first one, in Qwen3-VL else the times, which images repeat.
            rows = torch.arange(input_ids.shape[1], device=input_ids.device).expand(1, *input_ids.shape)
            position_ids = torch.cat([rows, position_ids])
        outputs = self.hf_model.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=None,  # padding is on the right, where causal attention never looks
            position_ids=position_ids,
            use_cache=False,  # with a cache, the default, transformers does not detect packed rows
            **packing,
            **early,
        )
        return VlmOutputs(outputs.last_hidden_state.flatten(0, 1), features, patch_features)

    def logits(self, hidden_states: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens V"]:
        """Return the language model's logits of hidden states."""
        return self.hf_model.lm_head(hidden_states.to(self.hf_model.lm_head.weight.dtype))

    def logits_of(
        self, hidden_states: Float[Tensor, "*tokens D"], token_ids: Int64[Tensor, " T"]
    ) -> Float[Tensor, "*tokens T"]:
        """Return the logits of some tokens alone.

        Call it inside the forward pass: outside, FSDP has sharded the output matrix.
        """
        weight = self.hf_model.lm_head.weight[token_ids]
        return F.linear(hidden_states.to(weight.dtype), weight)

    def token_losses(self, hidden_states: Float[Tensor, "K D"], labels: Int64[Tensor, " K"]) -> Float[Tensor, " K"]:
        """Return the cross-entropy of the logits of hidden states with `labels`, without keeping them.

        Call it inside the forward pass: outside, FSDP has sharded the output matrix.
        """
        return token_losses(hidden_states, self.hf_model.lm_head.weight, labels)

    def blank_image(self, device: torch.device) -> tuple[UInt8[Tensor, "P values"], Int64[Tensor, "1 3"]]:
        """Return the smallest image the vision tower accepts, black, and its grid."""
        config = self.hf_model.config.vision_config
        side = config.spatial_merge_size
        patches = torch.zeros(side * side, 3 * config.patch_size**2, dtype=torch.uint8, device=device)
        return patches, torch.tensor([[1, side, side]], device=device)


def _to_its_dtype(norm: str, merger: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    # A trained tower in float32 may be below a frozen merger in bfloat16.
    layer: Any = merger.get_submodule(norm)
    return (inputs[0].to(layer.weight.dtype),)


def scatter_features(
    inputs_embeds: Float[Tensor, "B L D"], image_mask: Bool[Tensor, "B L"], features: Float[Tensor, "vision_tokens D"]
) -> Float[Tensor, "B L D"]:
    """Return `inputs_embeds` with `features` at the placeholders, True in `image_mask`.

    Raises:
        ValueError: There are more or fewer placeholders than features.
    """
    index = image_mask.flatten().nonzero().squeeze(1)
    if len(index) != len(features):
        raise ValueError(
            f"input_ids hold {len(index)} image placeholders but the images give {len(features)} vision tokens: "
            "encode the text with recipe.data.encode and the images with the same image settings"
        )
    return inputs_embeds.flatten(0, 1).index_copy(0, index, features).view_as(inputs_embeds)


def check_packing_contract(
    input_ids: Int[Tensor, "B L"],
    attention_mask: Int[Tensor, "B L"] | None,
    position_ids: Int[Tensor, "..."],
    segment_lengths: list[int] | None,
) -> None:
    """Raise if a call breaks transformers' contract for packed rows, which would mix samples silently (4.57, measured).

    Raises:
        ValueError: The call is neither padded rows (a mask, 3 rows of positions) nor one packed row (no mask, 4 rows,
            segment lengths).
    """
    packed = attention_mask is None
    expected = (4 if packed else 3, *input_ids.shape)
    covered = segment_lengths is None
    if packed:
        covered = input_ids.shape[0] == 1 and segment_lengths is not None and sum(segment_lengths) == input_ids.shape[1]
    if tuple(position_ids.shape) != expected or not covered:
        kind = "a packed row (attention_mask None)" if packed else "padded rows (attention_mask given)"
        raise ValueError(
            f"{kind} need position_ids of shape {expected} and {'their' if packed else 'no'} segment lengths; got "
            f"position_ids {tuple(position_ids.shape)} and segments {segment_lengths} for input_ids "
            f"{tuple(input_ids.shape)}: use recipe.data.collate's collate_standard or collate_packed"
        )


def read_hf_config(name: str) -> PretrainedConfig:
    """Return a checkpoint's config.

    Raises:
        ConfigError: It is of a family that is not supported, or was written by a later transformers that moved its
            keys.
        OSError: The folder or name holds none.
    """
    if content := PretrainedConfig.get_config_dict(name)[0]:  # {}: a folder without one, which is named below
        family_named(content.get("model_type"), name)  # AutoConfig may not know the type
    config: Any = AutoConfig.from_pretrained(name)
    text = config.get_text_config()
    # transformers 5 keeps both in `rope_parameters`, which 4 does not read.
    if IS_TRANSFORMERS_4 and getattr(text, "rope_parameters", None) and not getattr(text, "rope_scaling", None):
        raise ConfigError(
            f"model.pretrained_model_name_or_path={name!r} was written by transformers {_writer(name)}, which "
            f"{transformers.__version__} cannot read (rope_parameters): save it with transformers 4, or install 5"
        )
    return config


def mapped_dtype(name: str, dtype: str) -> str:
    """Return the precision of a checkpoint's weights, or `dtype` if that does not hold all their values.

    Weights that are read in their own precision are mapped from their files. Without safetensors files, or with several
    precisions in them, it is `dtype` too.
    """
    try:
        files = [cached_file(name, SAFE_WEIGHTS_NAME)]
    except OSError:
        try:
            index: Any = cached_file(name, SAFE_WEIGHTS_INDEX_NAME)
            shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
            files = [cached_file(name, shard) for shard in shards]
        except OSError:
            return dtype
    found: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            found |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118  (no dict)
    stored = SAFETENSORS_DTYPES.get(found.pop(), dtype) if len(found) == 1 else dtype
    wanted: torch.dtype = getattr(torch, dtype)
    return stored if torch.promote_types(getattr(torch, stored), wanted) == wanted else dtype


def _writer(name: str) -> str:
    """Return the version of transformers that wrote a checkpoint."""
    return str(PretrainedConfig.get_config_dict(name)[0].get("transformers_version", "of another version"))


def _check_loaded(name: str, config: Any, vlm: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise ConfigError if weights were not found, which transformers fills at random; warn of those not used."""
    # Reported as missing if the config ties it, and always if it is stored under its tied name.
    tied = {"lm_head.weight"} if vlm.lm_head.weight is vlm.get_input_embeddings().weight else set[str]()
    missing = sorted(set(info["missing_keys"]) - tied)
    reshaped = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in info["mismatched_keys"])
    unused = sorted(info["unexpected_keys"])
    problems = [
        f"{what} {len(names)} of its {len(vlm.state_dict())} weights ({_some(names)})"
        for what, names in (("lacks", missing), ("has in another shape", reshaped))
        if names
    ]
    beyond = f"; it has {len(unused)} that the model does not know ({_some(unused)})" if unused else ""
    if problems:
        raise ConfigError(
            f"model.pretrained_model_name_or_path={name!r} {' and '.join(problems)}{beyond}. They would be random: "
            f"give a whole checkpoint with Hugging Face's names (written by transformers {_writer(name)}, read by "
            f"{transformers.__version__})"
        )
    if unused:
        log.warning("%s%s: they are not used", name, beyond.replace("; it", ""))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def load_vlm(
    pretrained_model_name_or_path: str, attn_implementation: str, dtype: str, gradient_checkpointing: bool = False
) -> PreTrainedModel:
    """Load the model from a local folder or the hub; `attn_implementation` may also be `auto`.

    Raises:
        ConfigError: The folder or name holds no checkpoint, one that this version of transformers cannot read, or not
            all weights of the model.
    """
    name = pretrained_model_name_or_path
    verbosity = transformers.logging.get_verbosity()
    try:
        config = read_hf_config(name)
        transformers.logging.set_verbosity_error()  # it lists every missing weight
        loaded: Any = getattr(transformers, family_of(config).model).from_pretrained(
            name,
            config=config,
            attn_implementation=resolve_attention(attn_implementation),
            dtype=getattr(torch, dtype),
            ignore_mismatched_sizes=True,  # reported below, in one line
            output_loading_info=True,
        )
        vlm, info = loaded
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: the hub does not allow the name
        raise ConfigError(
            f"model.pretrained_model_name_or_path={name!r} is neither a checkpoint folder "
            f"nor a reachable name on the hub ({str(error).splitlines()[0]})"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    _check_loaded(name, config, vlm, info)
    if gradient_checkpointing:  # non-reentrant: the reentrant kind drops gradients if the inputs need none
        vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return vlm
