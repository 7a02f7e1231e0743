"""The language model: Qwen2.5-VL through `from_pretrained`, vision features computed once and shared with the head."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration
from transformers.utils.import_utils import is_flash_attn_2_available

from recipe.models.attention import register


@dataclass
class VlmOutputs:
    """Hidden states and vision features of one batch; letters as in `recipe.schema`.

    Attributes:
        last_hidden_state: (B * L, D), after the final norm.
        image_features: I tensors of (tokens of the image, D), raster order, after the merger.
        patch_features: I tensors of (tokens of the image, merge², C), before it: of each token its patches in raster
            order, C wide as the vision tower; none if they were not asked for.
    """

    last_hidden_state: Tensor
    image_features: tuple[Tensor, ...]
    patch_features: tuple[Tensor, ...]


class PixelNormalizer(nn.Module):
    """uint8 patches → the `pixel_values` of Hugging Face's image processor, on the device, one frame of the equal ones.

    Args:
        image_mean: Of each channel, of values in [0, 1].
        image_std: Of each channel, of values in [0, 1].
    """

    def __init__(self, image_mean: Sequence[float], image_std: Sequence[float]):
        super().__init__()
        # Rescaling is folded in as the fast processor does: (x - 255 mean) / (255 std), in float32.
        self.register_buffer("mean", torch.tensor(image_mean).mul(255.0).view(1, -1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_std).mul(255.0).view(1, -1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, pixel_patches: Tensor) -> Tensor:
        """(P, 3 * patch * patch) uint8 → (P, 3 * patch * patch) float32."""
        pixels = pixel_patches.view(len(pixel_patches), self.mean.shape[1], -1).to(self.mean.dtype, copy=True)
        # In place: fresh memory costs a CPU more than the arithmetic.
        return pixels.sub_(self.mean).div_(self.std).flatten(1)


class ImageEmbedding(nn.Module):
    """Qwen's patch embedding of images: one matrix product with the sum of the frames' weights.

    Qwen's is a convolution over the frames of a film, in which an image is a film of equal frames. The sum gives the
    same at half the cost; and a convolution whose stride is its kernel is slower than the product that it is.

    Args:
        patch_embed: Hugging Face's; its weights stay where they are under the same name.
    """

    def __init__(self, patch_embed: nn.Module):
        super().__init__()
        self.proj: Any = patch_embed.proj

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(P, 3 * patch * patch), of one frame → (P, C)."""
        weight: Tensor = self.proj.weight.sum(2)  # (C, 3, frames, patch, patch) → (C, 3, patch, patch)
        return F.linear(pixel_values.to(weight.dtype), weight.flatten(1))


class VisionLanguageModel(nn.Module):
    """Wraps `Qwen2_5_VLForConditionalGeneration`: one pass gives hidden states and the image features they read.

    Args:
        hf_model: The loaded model; its patch embedding is replaced by a `ImageEmbedding`.
        normalizer: Turns the batch's uint8 patches into `pixel_values`.
    """

    def __init__(self, hf_model: PreTrainedModel, normalizer: PixelNormalizer):
        super().__init__()
        visual: Any = hf_model.model.visual
        visual.patch_embed = ImageEmbedding(visual.patch_embed)
        self.hf_model = hf_model
        self.normalizer = normalizer

    @property
    def text_config(self) -> Any:
        """The language model's part of the checkpoint's config."""
        return self.hf_model.config.get_text_config()

    @property
    def embed_tokens(self) -> nn.Module:
        """The token embedding, shared with the caption decoder."""
        return self.hf_model.get_input_embeddings()

    def image_features(
        self, pixel_patches: Tensor, image_grid_thw: Tensor, with_patches: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Vision features of every image: after the merger (tokens, D), and before it (tokens, merge², C).

        Args:
            pixel_patches: (P, 3 * patch * patch) uint8.
            image_grid_thw: (I, 3).
            with_patches: False: none of the second kind.
        """
        pixel_values = self.normalizer(pixel_patches).to(self.hf_model.dtype)
        visual = self.hf_model.model.visual
        order = window_order(visual, image_grid_thw.cpu()) if with_patches else None  # read before the tower is queued
        merged: list[Tensor] = []
        hook = visual.merger.register_forward_pre_hook(lambda _, inputs: merged.append(inputs[0]))
        try:
            features = self.hf_model.model.get_image_features(pixel_values, image_grid_thw)
        finally:
            hook.remove()
        features = tuple(getattr(features, "pooler_output", features))
        if order is None:
            return features, ()
        raster = order.argsort().to(merged[0].device)
        patches = merged[0].unflatten(0, (-1, visual.spatial_merge_unit))[raster]
        return features, patches.split([len(tokens) for tokens in features])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        segment_lengths: list[int] | None,
        pixel_patches: Tensor,
        image_grid_thw: Tensor,
        with_patches: bool = False,
    ) -> VlmOutputs:
        """Runs the vision tower once and the language model over its features.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L) for padded rows; None for one packed row.
            position_ids: (3, B, L) for padded rows; (4, 1, L) for one packed row.
            segment_lengths: Tokens of each sample of a packed row; None for padded rows.
            pixel_patches: (P, 3 * patch * patch) uint8.
            image_grid_thw: (I, 3).
            with_patches: Give the vision features before the merger too.

        Raises:
            ValueError: The image placeholders of `input_ids` are not as many as the vision tokens.
        """
        check_packing_contract(input_ids, attention_mask, position_ids, segment_lengths)
        inputs_embeds = self.embed_tokens(input_ids)
        if len(image_grid_thw):
            features, patch_features = self.image_features(pixel_patches, image_grid_thw, with_patches)
            flat = torch.cat(features).to(inputs_embeds.dtype)
            inputs_embeds = scatter_features(inputs_embeds, input_ids == self.hf_model.config.image_token_id, flat)
        else:
            # Every rank must touch the vision tower in every step, or DDP and FSDP wait for ever.
            features, patch_features = (), ()
            inputs_embeds = inputs_embeds + 0.0 * self._blank_features(input_ids.device).sum()
        outputs = self.hf_model.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,  # the default makes a cache, which switches the detection of packed rows off
            **packing_arguments(segment_lengths, input_ids.device),
        )
        return VlmOutputs(outputs.last_hidden_state.flatten(0, 1), features, patch_features)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The language model's head on chosen positions: (..., D) → (..., V)."""
        return self.hf_model.lm_head(hidden_states.to(self.hf_model.dtype))

    def blank_image(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the smallest image the vision tower takes, black: (patches uint8, grid)."""
        config = self.hf_model.config.vision_config
        side = config.spatial_merge_size
        patches = torch.zeros(side * side, 3 * config.patch_size**2, dtype=torch.uint8, device=device)
        return patches, torch.tensor([[1, side, side]], device=device)

    def _blank_features(self, device: torch.device) -> Tensor:
        return torch.cat(self.image_features(*self.blank_image(device))[0])


def window_order(visual: Any, image_grid_thw: Tensor) -> Tensor:
    """(vision tokens,) int64: the order in which the tower keeps the tokens of all images, by attention windows."""
    if hasattr(visual, "get_window_index"):
        return visual.get_window_index(image_grid_thw)[0]
    from transformers.vision_utils import get_vision_window_index  # type: ignore[import-not-found]  # transformers 5

    return get_vision_window_index(image_grid_thw, visual.spatial_merge_size, visual.window_size, visual.patch_size)[0]


def scatter_features(inputs_embeds: Tensor, image_mask: Tensor, features: Tensor) -> Tensor:
    """Puts vision features in the places of the image placeholders.

    Args:
        inputs_embeds: (B, L, D).
        image_mask: (B, L), True at placeholders.
        features: (number of vision tokens, D).

    Raises:
        ValueError: There are more or fewer placeholders than features.
    """
    index = image_mask.flatten().nonzero().squeeze(1)
    if len(index) != len(features):
        raise ValueError(
            f"input_ids hold {len(index)} image placeholders but the images give {len(features)} vision tokens: "
            "encode the text with recipe.data.encode and the images with the same image settings"
        )
    flat = inputs_embeds.flatten(0, 1).index_copy(0, index, features)
    return flat.view_as(inputs_embeds)


def check_packing_contract(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, segment_lengths: list[int] | None
) -> None:
    """Holds transformers' contract for packed rows, whose breach mixes samples silently (4.57, measured).

    Raises:
        ValueError: The call is neither padded rows (a mask, 3 position rows) nor one packed row (no mask, 4 rows, its
            segments known).
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


def packing_arguments(segment_lengths: list[int] | None, device: torch.device) -> dict[str, Any]:
    """What the attention functions need to keep the samples of a packed row apart; nothing for padded rows."""
    if segment_lengths is None:
        return {}
    ends = torch.tensor([0, *accumulate(segment_lengths)], dtype=torch.int32, device=device)
    longest = max(segment_lengths)
    return {
        "segment_lengths": segment_lengths,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def resolve_attention(attn_implementation: str) -> str:
    """`auto` → flash-attention 2 on CUDA if it is installed, else `recipe.models.attention`; others pass through."""
    if attn_implementation != "auto":
        return attn_implementation
    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else register()


def load_vlm(
    pretrained_model_name_or_path: str, attn_implementation: str, dtype: str, gradient_checkpointing: bool = False
) -> PreTrainedModel:
    """Loads Qwen2.5-VL from a local folder or the hub.

    Args:
        pretrained_model_name_or_path: As in transformers.
        attn_implementation: As in transformers, or `auto`.
        dtype: float32, bfloat16 or float64.
        gradient_checkpointing: Recompute activations in the backward pass (non-reentrant: the reentrant kind drops
            gradients if the inputs need none).

    Raises:
        ValueError: The folder or name holds no checkpoint.
    """
    try:
        vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            pretrained_model_name_or_path,
            attn_implementation=resolve_attention(attn_implementation),
            dtype=getattr(torch, dtype),
        )
    except (OSError, ValueError) as error:  # ValueError: a name that the hub does not allow either
        raise ValueError(
            f"model.pretrained_model_name_or_path={pretrained_model_name_or_path!r} is neither a checkpoint folder "
            f"nor a reachable name on the hub ({str(error).splitlines()[0]})"
        ) from error
    if gradient_checkpointing:
        vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return vlm
