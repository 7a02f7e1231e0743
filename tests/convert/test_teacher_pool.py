"""The choice of teachers: coverage first, then spread, always the same."""

from pathlib import Path

import pytest
from convert_helpers import read_samples, run_main

from convert.coco import find, read_instances
from convert.shapes import draw_scene
from convert.shapes import iter_samples as iter_shapes
from convert.teachers import Candidate, candidate, choose
from convert.write import convert_split, write_split
from recipe.schema import Object, Sample


def made(index: int, captions: str, num_objects: int = 1, object_size: float = 0.5) -> Candidate:
    return Candidate(index, frozenset(captions), num_objects, object_size)


def test_greedy_coverage_by_hand() -> None:
    pool = [made(10, "ab", 9, 0.9), made(11, "cde"), made(12, "abc"), made(13, "f"), made(14, "abcd")]
    assert choose(pool, 3, seed=0) == [14, 11, 13] or choose(pool, 3, seed=0) == [14, 13, 11]


def test_spread_once_all_captions_are_there() -> None:
    """After the first (most captions), the farthest in (log count, log size) from all picked."""
    pool = [made(0, "ab", 1, 0.1), made(1, "a", 1, 0.11), made(2, "a", 9, 0.9), made(3, "b", 1, 0.9)]
    for seed in range(5):
        assert choose(pool, 4, seed) == [0, 2, 3, 1]


def test_seed_decides_between_equals() -> None:
    pool = [made(index, "a") for index in range(20)]
    assert choose(pool, 20, seed=1) == choose(pool, 20, seed=1)
    assert choose(pool, 5, seed=1) != choose(pool, 5, seed=2)
    assert sorted(choose(pool, 20, seed=1)) == list(range(20))


def test_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 teachers asked, but only 1 .*--num-samples"):
        choose([made(0, "a")], 3, seed=0)
    with pytest.raises(ValueError, match="only 0"):
        choose([], 1, seed=0)


def test_who_can_teach() -> None:
    cat, crowd = Object((0, 0, 10, 5), "cat"), Object((0, 0, 20, 10), "crowd", iscrowd=True)
    chat = ({"role": "user", "content": "hi"},)
    assert candidate(4, Sample("a", b"x", 20, 10, (cat, crowd))) == Candidate(4, frozenset({"cat"}), 1, 0.5)
    assert candidate(4, Sample("a", b"x", 20, 10, (crowd,))) is None
    assert candidate(4, Sample("a", b"x", 20, 10, ())) is None
    assert candidate(4, Sample("a", b"x", 20, 10, None)) is None
    assert candidate(4, Sample("a", b"", 0, 0, None, chat)) is None


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = list(iter_shapes(60, seed=1, image_size=56, min_objects=0))
    write_split(samples, str(tmp_path / "data"), "train", size_limit="20kb")
    arguments = ["--local", tmp_path / "data", "--split", "train", "--num-samples", 12, "--seed", 5]
    for name in "ab":
        run_main(monkeypatch, "teachers", *arguments, "--out", tmp_path / name)
    pool = read_samples(tmp_path / "a", None)
    assert pool == read_samples(tmp_path / "b", None)
    assert len({sample.id for sample in pool}) == 12
    assert all(sample in samples and sample.objects for sample in pool)
    captions = {item.caption for sample in pool for item in sample.objects or ()}
    first = {item.caption for sample in samples[:12] for item in sample.objects or ()}
    assert len(captions) > len(first)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "00000",
        "index.json",
        "records.jsonl.gz",
    ]
    with pytest.raises(SystemExit, match="61 teachers asked"):
        run_main(monkeypatch, "teachers", *arguments, "--num-samples", 61, "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, "teachers", *arguments, "--split", "none", "--out", tmp_path / "c")
    assert stop.value.code == 1


def test_a_damaged_shard_makes_no_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write_split((draw_scene(1, index, 56) for index in range(4)), str(tmp_path / "d"), "train")
    (shard,) = (tmp_path / "d" / "train").rglob("*.mds")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    arguments = ["--local", tmp_path / "d", "--split", "train", "--out", tmp_path / "pool", "--num-samples", 2]
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, "teachers", *arguments)
    assert stop.value.code == 1
    assert f"{shard}: xxh64 is" in capsys.readouterr().err
    assert not (tmp_path / "pool").exists()


@pytest.mark.shared_data
def test_real_pool(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shared_data / "coco_cc_train"
    convert_split(find(read_instances(folder / "instances.json"), folder / "images"), str(tmp_path / "d"), "train")
    arguments = ["--local", tmp_path / "d", "--split", "train", "--out", tmp_path / "pool", "--num-samples", 16]
    run_main(monkeypatch, "teachers", *arguments)
    pool, first = (
        _names(samples) for samples in (read_samples(tmp_path / "pool", None), read_samples(tmp_path / "d")[:16])
    )
    assert len(pool) >= 1.3 * len(first)


def _names(samples: list[Sample]) -> set[str]:
    return {item.caption for sample in samples for item in sample.objects or () if not item.iscrowd}
