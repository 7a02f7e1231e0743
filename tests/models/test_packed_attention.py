"""Attention by segments: softmax by hand over a block-diagonal mask, and its edges."""

import pytest
import torch
from torch import Tensor, nn

from recipe.models.vlm import packed_sdpa

SEGMENTS = [5, 1, 7]
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


@pytest.fixture
def states() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(SEGMENTS), WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query, key, value


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k / sqrt(w)) v with every key head shared by two query heads: (B, L, heads, w)."""
    key, value = (part.repeat_interleave(HEADS // KEY_HEADS, dim=1) for part in (key, value))
    scores = (query @ key.transpose(-1, -2) / WIDTH**0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
def test_segments_are_a_block_diagonal_mask(states: tuple[Tensor, Tensor, Tensor], causal: bool):
    mask = torch.block_diag(*(torch.ones(length, length) for length in SEGMENTS)).bool()
    expected = dense_attention(*states, mask.tril() if causal else mask)
    found, _ = packed_sdpa(nn.Module(), *states, None, is_causal=causal, segment_lengths=SEGMENTS)
    # measured: 8.9e-16
    assert float((found - expected).abs().max()) <= 1e-12


def test_padded_rows_use_the_mask_they_are_given(states: tuple[Tensor, Tensor, Tensor]):
    mask = torch.ones(13, 13, dtype=torch.bool).tril()
    mask[:, 3] = False
    mask[3, 3] = True
    found, _ = packed_sdpa(nn.Module(), *states, mask[None, None])
    assert float((found - dense_attention(*states, mask)).abs().max()) <= 1e-12


def test_without_mask_and_segments_the_layer_says_whether_it_is_causal(states: tuple[Tensor, Tensor, Tensor]):
    whole = torch.ones(13, 13, dtype=torch.bool)
    layer = nn.Module()
    for causal, mask in ((True, whole.tril()), (False, whole)):
        layer.is_causal = causal  # type: ignore[assignment]
        found, _ = packed_sdpa(layer, *states, None)
        assert float((found - dense_attention(*states, mask)).abs().max()) <= 1e-12


def test_the_one_query_of_a_cached_step_sees_all_keys(states: tuple[Tensor, Tensor, Tensor]):
    query, key, value = states
    found, _ = packed_sdpa(nn.Module(), query[:, :, -1:], key, value, None)
    expected = dense_attention(query[:, :, -1:], key, value, torch.ones(1, 13, dtype=torch.bool))
    assert float((found - expected).abs().max()) <= 1e-12


def test_one_segment_gets_no_gradient_from_another(states: tuple[Tensor, Tensor, Tensor]):
    query, key, value = (part.requires_grad_() for part in states)
    attended, _ = packed_sdpa(nn.Module(), query, key, value, None, is_causal=True, segment_lengths=SEGMENTS)
    for gradient in torch.autograd.grad(attended[:, 5].sum(), [key, value]):
        assert not gradient[:, :, :5].any() and not gradient[:, :, 6:].any()


@pytest.mark.parametrize("segments", [[5, 7], [5, 1, 8], [13, 1]])
def test_segments_that_do_not_cover_the_row_raise(states: tuple[Tensor, Tensor, Tensor], segments: list[int]):
    with pytest.raises(ValueError, match="do not cover a row"):
        packed_sdpa(nn.Module(), *states, None, segment_lengths=segments)
