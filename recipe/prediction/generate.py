"""Generation: captions of kept queries with a key/value cache, and the language model's own answer."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recipe.models.caption_decoder import CaptionCache, CaptionDecoder
from recipe.models.sharding import on_all_ranks
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
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> Tensor:
    """Write the captions of R queries of N images, all at once.

    Args:
        decoder: The caption decoder.
        query_features: (R, W).
        boxes: (R, 4) cxcywh in [0, 1].
        places: Of the captions.
        memory: Of the N images.
        embed: Token ids → (..., D).
        logits: (..., D) → (..., V).
        eos_token_id: Ends a caption.
        lockstep: Continue until every rank's captions have ended, as sharded parameters need.
        num_beams: 1: greedy, each token the likeliest. More: beam search.
        length_penalty: Of beam search.

    Returns:
        (R, C) int64: after its end a caption continues with `eos_token_id`.
    """
    num_captions, device = len(query_features), query_features.device
    if num_beams > 1:
        query_features, boxes = (rows.repeat_interleave(num_beams, dim=0) for rows in (query_features, boxes))
        places = _places_of_beams(places, num_beams)
    cache = CaptionCache()

    def next_logits(tokens: Tensor | None) -> Tensor:
        """The tokens just chosen, (R * K,) → (R * K, V)."""
        embeds = None if tokens is None else embed(tokens[:, None])
        return logits(decoder(query_features, boxes, places, memory, embeds, cache)[:, 0])

    def next_of_beams(parents: Tensor | None, tokens: Tensor | None) -> Tensor:
        """See `recipe.prediction.generate.BeamStep`."""
        if parents is not None and tokens is not None:
            first = torch.arange(num_captions, device=device) * num_beams
            cache.reorder((first[:, None] + parents).flatten())
            tokens = tokens.flatten()
        return next_logits(tokens).unflatten(0, (num_captions, num_beams))

    longest = decoder.max_caption_tokens
    if num_beams == 1:
        return _greedy_search(next_logits, num_captions, longest, eos_token_id, device, lockstep)
    return beam_search(next_of_beams, num_captions, num_beams, longest, eos_token_id, length_penalty, device, lockstep)


def _places_of_beams(places: CaptionPlaces, num_beams: int) -> CaptionPlaces:
    """The beams of an image are captions beside one another, so that its memory is not copied for them."""
    beams = torch.arange(num_beams, device=places.slot.device)
    slots = (places.slot[:, None] * num_beams + beams).flatten()
    return CaptionPlaces(
        places.image.repeat_interleave(num_beams), slots, places.num_images, places.num_slots * num_beams
    )


def _greedy_search(
    next_logits: Callable[[Tensor | None], Tensor],
    num_captions: int,
    max_tokens: int,
    eos_token_id: int,
    device: torch.device,
    lockstep: bool,
) -> Tensor:
    """Return (R, C) int64: every token the likeliest after those before it."""
    tokens: list[Tensor] = []
    finished = torch.zeros(num_captions, dtype=torch.bool, device=device)
    for _ in range(max_tokens):
        chosen = next_logits(tokens[-1] if tokens else None).argmax(-1).masked_fill(finished, eos_token_id)  # (R,)
        tokens.append(chosen)
        finished |= chosen == eos_token_id
        ended = bool(finished.all())
        if on_all_ranks(ended, device) if lockstep else ended:
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
    """Let the language model answer, through transformers' own `generate`.

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
            # Without them transformers 5 gives the tokens of an image the positions of words.
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


# (parents, tokens), each (R, K), → logits (R, K, V): beam k goes on from beam `parents[k]` of the last step, with
# the token `tokens[k]`. Both are None in the first step, when all K beams are one and the same.
BeamStep = Callable[[Tensor | None, Tensor | None], Tensor]


def beam_search(
    step: BeamStep,
    num_rows: int,
    num_beams: int,
    max_tokens: int,
    eos_token_id: int,
    length_penalty: float,
    device: torch.device,
    lockstep: bool = False,
) -> Tensor:
    """The likeliest of the sequences that `num_beams` prefixes at a time lead to, each row searched apart.

    What it finds is what transformers' beam search finds (4.57, `GenerationMixin._beam_search`) with
    `early_stopping="never"`: of the 2 K likeliest continuations of the K beams those that end, if among the first K,
    are candidates for the result, and the K likeliest others go on; a candidate's score is its log-probability divided
    by its length, end-of-sequence counted, to the power `length_penalty`; at `max_tokens` all candidates are taken as
    ended. A row is searched until no beam of it could beat its best candidate.

    Args:
        step: Gives the logits.
        num_rows: R.
        num_beams: K.
        max_tokens: Longest sequence.
        eos_token_id: Ends a sequence.
        length_penalty: 0 or more: 0 compares whole log-probabilities, 1 their mean over the tokens.
        device: Of the logits.
        lockstep: Go on until every rank is done, as sharded parameters need.

    Returns:
        (R, C) int64: after its end a sequence goes on with `eos_token_id`.
    """
    scores = torch.full((num_rows, num_beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # of equal beams only one counts
    prefixes = torch.empty(num_rows, num_beams, 0, dtype=torch.int64, device=device)
    best_score = torch.full((num_rows,), -torch.inf, device=device)
    best = torch.full((num_rows, max_tokens), eos_token_id, device=device)
    parents: Tensor | None = None
    tokens: Tensor | None = None
    length = 0
    for length in range(1, max_tokens + 1):
        totals, origins, chosen = _continuations(scores, step(parents, tokens), 2 * num_beams)  # (R, 2 K)
        grown = torch.cat([_take(prefixes, origins), chosen[..., None]], dim=-1)  # (R, 2 K, length)
        ended = (chosen == eos_token_id) | (length == max_tokens)

        finished = totals[:, :num_beams].masked_fill(~ended[:, :num_beams], -torch.inf) / length**length_penalty
        score, place = finished.max(-1)  # (R,)
        is_better = score > best_score
        best[:, :length] = torch.where(is_better[:, None], _take(grown, place[:, None])[:, 0], best[:, :length])
        best_score = torch.where(is_better, score, best_score)

        scores, going_on = totals.masked_fill(ended, -torch.inf).topk(num_beams)  # (R, K)
        prefixes, parents, tokens = _take(grown, going_on), origins.gather(1, going_on), chosen.gather(1, going_on)
        # A log-probability only falls, and is divided by the most at the greatest length.
        is_done = bool((best_score >= scores[:, 0] / max_tokens**length_penalty).all())
        if on_all_ranks(is_done, device) if lockstep else is_done:
            break
    return best[:, :length]


def _continuations(scores: Tensor, logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest continuations of all beams of a row, best first.

    Args:
        scores: (R, K) log-probabilities of the beams.
        logits: (R, K, V).
        count: Wanted.

    Returns:
        Their log-probabilities, beams and tokens, each (R, count).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, words = logits.topk(min(count, logits.shape[-1]))  # (R, K, ·)
    log_probs = top - logits.logsumexp(-1, keepdim=True)
    totals, places = (scores[..., None] + log_probs).flatten(1).topk(count)
    return totals, places // top.shape[-1], words.flatten(1).gather(1, places)


def _take(sequences: Tensor, places: Tensor) -> Tensor:
    """(R, K, C) → (R, k, C), those at `places` (R, k)."""
    return sequences.gather(1, places[..., None].expand(*places.shape, sequences.shape[-1]))
