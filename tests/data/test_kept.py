"""Counts by several processes are those of one, and fail as one does."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch

from recipe import records
from recipe.data import kept
from recipe.data.encode import Encoder
from recipe.data.kept import KeptCount, concatenated
from recipe.data.lengths import count_lengths, read_lengths, read_longest_caption
from recipe.data.mapped import Arrays
from recipe.records import RECORDS_FILE
from recipe.schema import Sample
from recipe.upstream.checked_stream import CheckedStream
from recipe.upstream.storage import open_streams


@pytest.fixture
def samples(make_sample, make_chat) -> list[Sample]:
    """37, of which some have several images."""
    return [make_chat(n, 3) if n % 9 == 4 else make_sample(n, n % 4, 40 + n, 30) for n in range(37)]


@pytest.fixture(params=[2, 3])
def stream(request, samples: list[Sample], tmp_path: Path, write_shards, monkeypatch) -> CheckedStream:
    """Counted by two or three processes, five records at once."""
    for module in (records, kept):
        monkeypatch.setattr(module, "BLOCK", 5)
    monkeypatch.setattr(kept, "LEAST_DIVIDED", 1)
    monkeypatch.setattr(kept, "usable_cores", lambda: request.param)
    (found,) = open_streams({"a": write_shards(tmp_path / "a", samples)})
    return found


def count_of(count: Callable[[Any], Arrays]) -> KeptCount:
    return KeptCount("test", "1", "a test", "skip it", count, join=concatenated)


def test_several_processes_count_what_one_does(stream: CheckedStream, samples: list[Sample], encoder: Encoder):
    expected = vars(count_lengths([replace(sample, image=b"") for sample in samples], encoder))
    found = vars(read_lengths([stream], encoder))
    assert expected["num_solved"] is not None
    for name, array in expected.items():
        assert np.array_equal(found[name], array) and found[name].dtype == array.dtype, name
    captions = [item.caption for sample in samples for view in sample.per_image() for item in view.objects or ()]
    longest = max(map(len, encoder.ids(captions)))
    assert read_longest_caption([stream], encoder.tokenizer) == 1 + longest


def test_they_share_the_work_in_order(stream: CheckedStream, samples: list[Sample]):
    def of_block(block: list[Sample]) -> Arrays:
        return {"ids": np.array([sample.id for sample in block]), "process": np.array([os.getpid()])}

    state = torch.get_rng_state()
    found = count_of(of_block).of(stream)
    assert torch.equal(torch.get_rng_state(), state), "the run's own random numbers do not depend on what is kept"
    assert found["ids"].tolist() == [sample.id for sample in samples]
    processes = found["process"].tolist()
    assert len(processes) == 8 and len({*processes} - {os.getpid()}) == kept.usable_cores()


def test_an_error_is_that_of_one_process(stream: CheckedStream):
    def refuse(block: list[Sample]) -> Arrays:
        if len(block) < 5:
            raise ValueError("sample 'last': no good")
        return {"n": np.arange(len(block))}

    with pytest.raises(ValueError, match=r"^sample 'last': no good$"):
        count_of(refuse).of(stream)


class OfTwo(ValueError):
    def __init__(self, first: str, second: str):
        super().__init__(f"{first} and {second}")


class Holding(KeyError):
    def __init__(self):
        super().__init__("bug")
        self.lock = Lock()


@pytest.mark.parametrize(
    "error, kind, text", [(OfTwo("a", "b"), ValueError, "OfTwo: a and b"), (Holding(), RuntimeError, "Holding: 'bug'")]
)
def test_an_error_that_cannot_be_sent_keeps_its_text(stream: CheckedStream, error, kind: type[Exception], text: str):
    def refuse(block: list[Sample]) -> Arrays:
        raise error

    with pytest.raises(kind) as raised:
        count_of(refuse).of(stream)
    assert str(raised.value) == text
    assert ("in refuse" in "".join(getattr(raised.value, "__notes__", ()))) == (kind is RuntimeError)


def test_a_count_that_does_not_come_is_no_shorter_count(stream: CheckedStream, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept, "_sendable", lambda error: Lock())  # nothing that could be sent

    def refuse(block: list[Sample]) -> Arrays:
        raise ValueError("lost")

    with pytest.raises(RuntimeError, match="its count did not come"):
        count_of(refuse).of(stream)
    assert not [*stream.folder.glob("test-*.npz")]


def test_damaged_records_are_named(stream: CheckedStream):
    path = stream.folder / RECORDS_FILE
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(records.DamagedRecordsError, match=r"cannot be read .* convert the data set again"):
        count_of(lambda block: {"n": np.arange(len(block))}).of(stream)


def test_few_records_need_no_other_process(stream: CheckedStream, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(kept, "LEAST_DIVIDED", 38)
    with caplog.at_level(logging.INFO):
        found = count_of(lambda block: {"n": np.array([len([*block]), os.getpid()])}).of(stream)
    assert found["n"].tolist() == [37, os.getpid()]
    assert "counted 37 samples for a test" in caplog.text
