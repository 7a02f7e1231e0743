"""Beam search, apart from what gives the logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from recipe.models.sharding import on_all_ranks

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
