"""The flash-attention path on CPU: what the kernel would be called with, and the same numbers as `packed_sdpa`.

A stand-in takes the kernel's place (`tests/support/flash_stub.py`), in a process of its own as it changes transformers.
"""

import json
from itertools import accumulate, pairwise
from typing import Any

import pytest

from tests.launches.launch import run_composer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tiny_checkpoint: str) -> dict[str, Any]:
    return json.loads(run_composer(0, "tests/models/flash_run.py", tiny_checkpoint).output.splitlines()[-1])


def split_calls(report: dict[str, Any], layout: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The calls of the language model, then those of the vision tower, which sees the future."""
    calls = report[layout]["calls"]
    return [call for call in calls if call["causal"]], [call for call in calls if not call["causal"]]


def test_the_language_model_attends_within_each_sample_of_a_packed_row(report: dict[str, Any]):
    calls, _ = split_calls(report, "packed")
    assert len(calls) == report["text_layers"]
    for call in calls:
        assert call["cu_seqlens"] == list(accumulate(report["lengths"], initial=0))
        assert call["max_seqlen_types"] == ["int", "int"]
        assert call["max_seqlens"] == [max(report["lengths"])] * 2


def test_padded_rows_are_one_dense_call(report: dict[str, Any]):
    """The padding follows each sample, where causal attention never looks: no mask, and no wait for its indices."""
    calls, _ = split_calls(report, "standard")
    assert len(calls) == report["text_layers"]
    for call in calls:
        assert not call["is_varlen"]
        assert call["cu_seqlens"] == [report["padded_length"]] * len(report["lengths"])


@pytest.mark.parametrize("layout", ["packed", "standard"])
def test_the_vision_tower_attends_within_windows_of_each_picture(report: dict[str, Any], layout: str):
    _, calls = split_calls(report, layout)
    pictures = list(accumulate(report["patches"], initial=0))
    assert len(calls) == report["vision_layers"]
    assert sum(call["cu_seqlens"] == pictures for call in calls) == report["full_vision_layers"]
    for call in calls:
        assert set(pictures) <= set(call["cu_seqlens"]), "no window reaches over two pictures"


@pytest.mark.parametrize("layout", ["packed", "standard"])
def test_every_other_call_is_one_over_sequences_of_given_lengths(report: dict[str, Any], layout: str):
    language, vision = split_calls(report, layout)
    for call in vision + (language if layout == "packed" else []):
        assert call["is_varlen"]
        assert call["cu_seqlens_dtypes"] == ["torch.int32", "torch.int32"]
        longest = max(end - start for start, end in pairwise(call["cu_seqlens"]))
        assert call["max_seqlens"] == [longest] * 2


@pytest.mark.parametrize("layout", ["packed", "standard"])
def test_outputs_and_gradients_are_those_of_packed_sdpa(report: dict[str, Any], layout: str):
    # float64; measured: 0 and 1.3e-16
    assert report[layout]["outputs"] <= 1e-12
    assert report[layout]["gradients"] <= 1e-12


def test_answers_generated_with_a_cache_are_the_same(report: dict[str, Any]):
    assert report["answers"] == report["expected_answers"]
    assert len(report["answers"]) == len(report["lengths"])
