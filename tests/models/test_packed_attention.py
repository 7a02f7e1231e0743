"""Attention by segments: softmax by hand over a block-diagonal mask, one call per segment, torch's kernel, edges."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipe.models import attention
from recipe.models.attention import attend_segments, describe_attention, fits_varlen, group_segments, packed_sdpa
from recipe.models.vlm import PixelNormalizer, VisionLanguageModel, load_vlm
from recipe.schema import Example

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


# Segments of one length, of several in any order, in order, all distinct, a single one, and single tokens.
LENGTHS = ([4, 4, 4], [6, 2, 6, 1, 2, 6, 3], [1, 1, 3, 3], [5, 1, 7], [9], [1, 1])


def one_call_each(states: list[Tensor], lengths: list[int], causal: bool, scale: float | None) -> Tensor:
    """What transformers does with the vision tower's windows."""
    parts = zip(*(part.split(lengths) for part in states), strict=True)
    heads = ([part.transpose(0, 1)[None] for part in row] for row in parts)
    return torch.cat(
        [F.scaled_dot_product_attention(*row, is_causal=causal, scale=scale)[0].transpose(0, 1) for row in heads]
    )


def grouped(
    states: Sequence[Tensor] | Tensor, lengths: list[int], causal: bool = False, scale: float | None = None
) -> Tensor:
    query, key, value = states
    return attend_segments(query, key, value, lengths, causal, scale=scale)


def with_gradients(attend: Callable[[list[Tensor]], Tensor], length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shape = (length, HEADS, WIDTH)
    states = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    attended = attend(states)
    weights = torch.randn(attended.shape, generator=generator, dtype=torch.float64)
    return [attended.detach(), *torch.autograd.grad((attended * weights).sum(), states)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("looping", [(), ("cpu",)])
def test_one_call_for_all_segments_of_equal_length_is_one_call_each(
    lengths: list[int], causal: bool, looping: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "LOOPING", looping)
    length = sum(lengths)
    found = with_gradients(lambda states: grouped(states, lengths, causal, 0.2), length)
    expected = with_gradients(lambda states: one_call_each(states, lengths, causal, 0.2), length)
    error = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
    assert error <= 1e-12  # measured: 6.7e-16


def test_segments_are_put_side_by_side_by_length():
    cpu = torch.device("cpu")
    segments = group_segments((6, 2, 6, 1, 2), cpu, True)
    assert segments.groups == ((1, 1), (2, 2), (2, 6))
    assert segments.order is not None and segments.inverse is not None
    assert segments.order.tolist() == [14, 6, 7, 15, 16, *range(6), *range(8, 14)]
    assert segments.order[segments.inverse].tolist() == list(range(17))
    assert (segments.ends.tolist(), segments.ends.dtype, segments.longest) == ([0, 6, 8, 14, 15, 17], torch.int32, 6)
    assert group_segments((2, 2, 5, 5), cpu, True).order is None
    assert group_segments((2, 2, 5), cpu, False).groups == ((2, 2), (1, 5))
    assert group_segments((2, 5, 2), cpu, False).groups == ((1, 2), (1, 5), (1, 2))
    assert group_segments((3, 1, 2), cpu, True).groups == ((1, 3), (1, 1), (1, 2))


def test_what_a_prediction_has_grouped_can_be_trained_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "LOOPING", ())
    lengths = [3, 2, 3, 2]
    with torch.inference_mode():
        grouped(torch.randn(3, 10, 1, 8), lengths)
    states = torch.randn(3, 10, 1, 8, requires_grad=True)
    grouped(states, lengths).sum().backward()


class Kernel:
    """torch's `varlen_attn` in plain torch; torch 2.11 has `window_size` in place of `is_causal`."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], bool]] = []

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, ends: list[Tensor], longest: int, causal: bool
    ) -> Tensor:
        assert all(end.dtype == torch.int32 for end in ends) and ends[0].equal(ends[1])
        lengths = ends[0].diff().tolist()
        assert longest == max(lengths) and sum(lengths) == len(query) == len(key)
        self.calls.append((lengths, causal))
        return one_call_each([query, key, value], lengths, causal, None)

    def of_2_10(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None) -> Tensor:
        assert max_q == max_k
        return self.attend(query, key, value, [cu_seq_q, cu_seq_k], max_q, is_causal)

    def of_2_11(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ) -> Tensor:
        assert max_q == max_k and scale is None and window_size in ((-1, 0), (-1, -1))
        return self.attend(query, key, value, [cu_seq_q, cu_seq_k], max_q, window_size == (-1, 0))


@pytest.fixture(params=["of_2_10", "of_2_11"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    found = Kernel()
    monkeypatch.setattr(attention, "varlen_kernel", lambda: getattr(found, request.param))
    monkeypatch.setattr(attention, "fits_varlen", lambda query: True)
    yield found


@pytest.mark.parametrize("causal", [True, False])
def test_torchs_kernel_is_called_once_with_all_segments(kernel: Kernel, causal: bool):
    lengths = [6, 2, 6, 1]
    found = with_gradients(lambda states: grouped(states, lengths, causal, 0.2), 15)
    assert kernel.calls == [(lengths, causal)]
    expected = with_gradients(lambda states: one_call_each(states, lengths, causal, 0.2), 15)
    error = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
    assert error <= 1e-12  # measured: 6.7e-16


def states_of(**changes: Any) -> Any:
    return SimpleNamespace(**{"is_cuda": True, "dtype": torch.bfloat16, "shape": (9, 2, 80), "device": 0, **changes})


def test_torchs_kernel_takes_half_precision_on_a_recent_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fits_varlen(states_of()) and fits_varlen(states_of(dtype=torch.float16))
    assert not fits_varlen(torch.zeros(9, 2, 80, dtype=torch.bfloat16))
    assert not fits_varlen(states_of(dtype=torch.float32))
    assert not fits_varlen(states_of(shape=(9, 2, 84)))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert fits_varlen(states_of(dtype=torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not fits_varlen(states_of())


def test_a_run_says_which_attention_it_uses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "varlen_kernel", lambda: None)
    assert describe_attention("eager") == (
        "eager, as model.attn_implementation says; the vision tower makes one call per window"
    )
    assert describe_attention("auto").endswith("(no GPU)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    assert "flash-attn is not installed, and torch" in describe_attention("auto")
    monkeypatch.setattr(attention, "varlen_kernel", lambda: max)
    assert describe_attention("auto").startswith(
        "torch's varlen_attn in half precision, as flash-attn is not installed"
    )
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert describe_attention("auto") == "flash_attention_2, which is installed"


@pytest.fixture
def examples(tiny_examples: dict[str, Example]) -> list[Example]:
    return [example for example in tiny_examples.values() if len(example.image_grid_thw)]


def features_and_gradients(checkpoint: str, implementation: str, examples: list[Example]) -> tuple[Any, list[Tensor]]:
    vlm = load_vlm(checkpoint, implementation, "float64")
    model = VisionLanguageModel(vlm, PixelNormalizer([0.5] * 3, [0.3] * 3), implementation)
    patches = torch.cat([example.pixel_patches for example in examples])
    features, _, _ = model.image_features(patches, torch.cat([example.image_grid_thw for example in examples]))
    found = torch.cat(features)
    found.square().sum().backward()
    tower = model.hf_model.model.visual
    return tower, [found.detach(), *(p.grad for _, p in sorted(tower.named_parameters()) if p.grad is not None)]


@pytest.mark.parametrize("looping", [(), ("cpu",)])
def test_the_vision_tower_is_transformers_with_fewer_calls(
    tiny_checkpoint: str, examples: list[Example], looping: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "LOOPING", looping)
    calls: list[int] = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    found, expected = {}, {}
    tower, states = features_and_gradients(tiny_checkpoint, "auto", examples)
    found["calls"], found["names"], found["states"] = len(calls), sorted(tower.state_dict()), states
    calls.clear()
    tower, states = features_and_gradients(tiny_checkpoint, "sdpa", examples)
    expected["calls"], expected["names"], expected["states"] = len(calls), sorted(tower.state_dict()), states
    assert found["names"] == expected["names"]
    assert found["calls"] < expected["calls"] / (1 if looping else 2)
    assert len(found["states"]) == len(expected["states"]) > 10
    error = max(
        float((one - other).norm() / other.norm())
        for one, other in zip(found["states"], expected["states"], strict=True)
    )
    assert error <= 1e-12  # measured: 0


def test_the_vision_tower_reads_its_windows_once(
    tiny_checkpoint: str, examples: list[Example], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
):
    tower, _ = features_and_gradients(tiny_checkpoint, "auto", examples)
    sizes = [int(grid.prod()) for example in examples for grid in example.image_grid_thw]
    assert len(kernel.calls) == len(tower.blocks)
    assert {sum(lengths) for lengths, _ in kernel.calls} == {sum(sizes)}
    assert sum(lengths == sizes for lengths, _ in kernel.calls) == len(tower.fullatt_block_indexes)
    assert not any(causal for _, causal in kernel.calls)
