"""Generate the captions of kept queries with a key/value cache, and the language model's answers."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recipe.models.caption_decoder import CaptionCache, CaptionDecoder
from recipe.models.network import on_all_ranks
from recipe.models.vlm import VisionLanguageModel
from recipe.schema import CaptionPlaces, Memory


@torch.no_grad()
def generate_captions(
    decoder: CaptionDecoder,
    query_features: Tensor,
    boxes: Tensor,
    places: CaptionPlaces,
    memory: Memory,
    embed: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    eos_token_id: int,
    lockstep: bool = False,
) -> Tensor:
    """Write the captions of R queries of N images, all at once and greedily.

    Args:
        decoder: The caption decoder.
        query_features: (R, W).
        boxes: (R, 4) cxcywh in [0, 1].
        places: Where each caption belongs.
        memory: Of the N images.
        embed: Token ids → (..., D).
        logits: (..., D) → (..., V).
        eos_token_id: Ends a caption.
        lockstep: Continue until every rank's captions have ended, as sharded parameters need.

    Returns:
        (R, C) int64, filled with `eos_token_id` after a caption's end.
    """
    cache, tokens = CaptionCache(), list[Tensor]()
    finished = torch.zeros(len(query_features), dtype=torch.bool, device=query_features.device)
    for _ in range(decoder.max_caption_tokens):
        embeds = embed(tokens[-1][:, None]) if tokens else None
        hidden = decoder(query_features, boxes, places, memory, embeds, cache)[:, 0]
        tokens.append(logits(hidden).argmax(-1).masked_fill(finished, eos_token_id))  # (R,)
        finished |= tokens[-1] == eos_token_id
        ended = bool(finished.all())
        if on_all_ranks(ended, finished.device) if lockstep else ended:
            break
    return torch.stack(tokens, dim=-1)


@torch.no_grad()
def generate_answers(
    vlm: VisionLanguageModel,
    prompts: Sequence[Tensor],
    pixel_patches: Tensor,
    image_grid_thw: Tensor,
    max_new_tokens: int,
    lockstep: bool = False,
) -> list[Tensor]:
    """Generate the language model's answers with transformers' `generate`, greedily.

    Args:
        vlm: The language model.
        prompts: One (S,) int64 per sample, up to and including the generation prompt.
        pixel_patches: (P, 3 * patch * patch) uint8, the images of all prompts in order.
        image_grid_thw: (I, 3).
        max_new_tokens: Longest answer.
        lockstep: Continue until every rank's answers have ended, as sharded parameters need.

    Returns:
        One (new tokens,) int64 per sample, end-of-sequence and padding among them.
    """
    hf_model: Any = vlm.hf_model
    pad_token_id: int = hf_model.generation_config.pad_token_id
    flipped = [prompt.flip(0) for prompt in prompts]
    input_ids = pad_sequence(flipped, batch_first=True, padding_value=pad_token_id).flip(1)  # padded on the left
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=input_ids.device)
    columns = torch.arange(input_ids.shape[1], 0, -1, device=input_ids.device)
    images = {}
    if len(image_grid_thw):
        pixel_values = vlm.normalizer(pixel_patches).to(hf_model.dtype)
        images = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        if "mm_token_type_ids" in signature(hf_model.forward).parameters:
            # Without them transformers 5 gives image tokens the positions of words.
            images["mm_token_type_ids"] = (input_ids == hf_model.config.image_token_id).int()
    generated = hf_model.generate(
        input_ids=input_ids,
        attention_mask=(columns <= lengths[:, None]).long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        synced_gpus=lockstep,
        **images,
    )
    return list(generated[:, input_ids.shape[1] :])
