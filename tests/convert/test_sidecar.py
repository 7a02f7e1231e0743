"""`recipe.records`: what is written comes back, and nothing else does."""

import gzip
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from recipe.records import RECORDS_FILE, join_parts, read_records, shards_sha256, to_record, write_part
from recipe.schema import FurtherImage, Object, Sample

SAMPLES = [
    Sample("a", b"picture", 20, 10, (Object((0.1, 1.5, 4.0, 5.0), "été"), Object((0, 0, 9, 9), "", True, 7.5))),
    Sample("b", b"picture", 3, 3, ()),
    Sample("c", b"picture", 3, 3, None),
    Sample(
        "several",
        b"picture",
        3,
        3,
        None,
        ({"role": "user", "content": "hi"},),
        further=(FurtherImage(b"other", 4, 5, ()), FurtherImage(b"third", 6, 7, (Object((0, 0, 1, 2), "x"),))),
    ),
    Sample("d", b"", 0, 0, None, ({"role": "user", "content": "hi", "name": "\ud800"},)),
]
INDEX: dict[str, Any] = {"shards": [{"samples": 4, "raw_data": {"basename": "x"}}, {"samples": 1}]}


def write(folder: Path, *parts: list[Sample], index: dict[str, Any] = INDEX) -> Path:
    paths = [folder / f"part-{number}" for number in range(len(parts))]
    for path, samples in zip(paths, parts, strict=True):
        write_part(path, map(to_record, samples))
    join_parts(folder / RECORDS_FILE, paths, index)
    return folder / RECORDS_FILE


def test_samples_come_back_without_their_pictures(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLES[:1], [], SAMPLES[1:])
    assert list(read_records(path, INDEX)) == [sample.without_bytes() for sample in SAMPLES]


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    first = write(tmp_path, SAMPLES).read_bytes()
    assert write(tmp_path, SAMPLES).read_bytes() == first


def test_it_is_bound_to_its_shards(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLES)
    other = {"shards": [*INDEX["shards"][:1], {"samples": 1, "raw_data": {"basename": "y"}}]}
    assert shards_sha256(other) != shards_sha256(INDEX)
    with pytest.raises(ValueError, match="written for other shards"):
        list(read_records(path, other))


def test_a_number_of_records_that_is_not_the_index_s(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLES[:4])
    with pytest.raises(ValueError, match=r"4 records, its index.json 5 samples"):
        list(read_records(path, INDEX))


def test_damage_is_an_error(tmp_path: Path) -> None:
    """Whatever byte is lost or flipped: an error, never other records."""
    path = write(tmp_path, SAMPLES)
    whole = path.read_bytes()
    expected = list(read_records(path, INDEX))
    for position in range(len(whole)):
        for damaged in (whole[:position], whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :]):
            path.write_bytes(damaged)
            with suppress(ValueError):
                assert list(read_records(path, INDEX)) == expected  # a flip in gzip's own header
    path.write_bytes(gzip.compress(b"[]\n"))
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_records(path, INDEX))
