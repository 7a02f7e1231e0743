"""Arrays of one number per sample: small, hashed as before, and held once per node."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.utils import dist

from recipe.data import mapped
from recipe.data.mapped import Arrays, hashed, shared_arrays, small_ints
from tests.launches.launch import leave, run_composer

NUMBERS = {"tokens": np.arange(5, dtype=np.int32), "is_long": np.array([False, True])}


def is_mapped(array: np.ndarray) -> bool:
    return isinstance(array.base, np.memmap)


def one_rank(folder: str, nodes: str) -> None:
    """What a rank gets, with a temporary folder per node."""
    dist.initialize_dist("cpu", timeout=60)
    rank = dist.get_global_rank()
    own = Path(folder, f"node{rank % int(nodes)}")
    own.mkdir(exist_ok=True)
    mapped.gettempdir, mapped.LEAST_SHARED = lambda: str(own), 1
    made: list[int] = []

    def make() -> Arrays:
        made.append(rank)
        return NUMBERS

    found = shared_arrays(make)
    assert found is not None
    row = {name: array.tolist() for name, array in found.items()}
    torch.save((row, made, all(map(is_mapped, found.values()))), Path(folder, f"{rank}.pt"))
    leave()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("nodes", [1, 2])
def test_every_rank_maps_what_rank_0_makes_once(nodes: int, tmp_path: Path):
    run_composer(2, __file__, str(tmp_path), str(nodes), timeout=120)
    expected = {name: array.tolist() for name, array in NUMBERS.items()}
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [(expected, [0], True), (expected, [], True)]
    assert len([*tmp_path.glob("node*/recipe-plans-*/arrays-*.npz")]) == nodes


def test_small_arrays_need_no_file(tmp_path: Path):
    found = shared_arrays(lambda: NUMBERS)
    assert found is not None and found["tokens"] is NUMBERS["tokens"] and not [*tmp_path.iterdir()]
    assert shared_arrays(lambda: None) is None


def test_other_names_or_numbers_are_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(mapped, "LEAST_SHARED", 1)
    tokens = NUMBERS["tokens"]
    different = [
        {"tokens": tokens},
        {"patches": tokens},
        {"tokens": tokens + 1},
        {"a": tokens[:2], "b": tokens[2:]},
        {"a": tokens[:3], "b": tokens[3:]},
        {"tokens": tokens.astype(np.int64)},
        {"boxes": np.arange(6).reshape(2, 3)},
        {"boxes": np.arange(6).reshape(3, 2)},
        {"boxes": np.arange(6).reshape(3, 2).T},  # another order in memory
    ]
    for arrays in (*different, different[0]):
        found = shared_arrays(lambda arrays=arrays: arrays)
        assert found is not None and [*found] == [*arrays]
        assert [array.dtype for array in found.values()] == [array.dtype for array in arrays.values()]
        assert [array.tolist() for array in found.values()] == [array.tolist() for array in arrays.values()]
    assert len([*tmp_path.glob("*/arrays-*.npz")]) == len(different)


def test_a_full_disk_costs_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path):
    def refuse(path: Path, arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "LEAST_SHARED", 1)
    monkeypatch.setattr(mapped, "write_mapped", refuse)
    with caplog.at_level(logging.WARNING):
        found = shared_arrays(lambda: NUMBERS)
    assert found is not None and found["tokens"] is NUMBERS["tokens"]
    assert f"{tmp_path} takes no file" in caplog.text and "No space left" in caplog.text


@pytest.mark.parametrize("error", [PermissionError("it belongs to another user"), NotImplementedError("no locks")])
def test_a_folder_that_cannot_be_used_ends_no_rank(error: Exception, monkeypatch: pytest.MonkeyPatch, caplog):
    def refuse() -> Path:
        raise error

    monkeypatch.setattr(mapped, "LEAST_SHARED", 1)
    monkeypatch.setattr(mapped, "node_folder", refuse)
    with caplog.at_level(logging.WARNING):
        found = shared_arrays(lambda: NUMBERS)
    assert found is not None and found["tokens"] is NUMBERS["tokens"] and str(error) in caplog.text


def test_an_error_is_raised():
    with pytest.raises(ZeroDivisionError):
        shared_arrays(lambda: {"tokens": np.array([1 // 0])})


def test_integers_hash_as_64_bits_and_booleans_as_they_are():
    many = np.arange(mapped._HASHED_AT_ONCE + 3)
    before = hashed([many, many > 4]).hexdigest()
    assert hashed([small_ints(many, len(many)), many > 4]).hexdigest() == before
    assert hashed([many + 1, many > 4]).hexdigest() != before


def test_numbers_are_small_where_they_fit():
    assert small_ints(np.array([2**31 - 1]), 2**31 - 1).dtype == np.int32
    assert small_ints(np.array([2**31]), 2**31).tolist() == [2**31]


if __name__ == "__main__":
    import sys

    one_rank(*sys.argv[1:])
