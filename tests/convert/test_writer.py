"""The shards appear whole or not at all; what is rejected is told."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from convert_helpers import read_rejected, read_samples

from convert.items import Item, Note, Rejected
from convert.write import write_split
from recipe.schema import Object, Sample

SAMPLES = [
    Sample(
        "a", b"not decoded here", 20, 10, (Object((0.0, 1.5, 4.0, 5.0), "été"), Object((0, 0, 9, 9), "", True, 7.5))
    ),
    Sample("b", b"\x00\xff", 3, 3, ()),
    Sample("c", b"", 0, 0, None, ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})),
]
BAD = Rejected("x", "file: line 9", "some reason", "value")


def failing() -> Iterator[Item]:
    yield SAMPLES[0]
    raise RuntimeError("midway")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_samples_come_back_equal(tmp_path: Path) -> None:
    summary = write_split(SAMPLES, str(tmp_path), "train", hashes=["xxh64"])
    assert read_samples(tmp_path) == SAMPLES
    assert (summary.samples, summary.images, summary.empty, summary.not_annotated) == (3, 2, 1, 1)
    assert (summary.objects, summary.crowd, summary.shards) == (2, 1, 1)
    shard = json.loads((tmp_path / "train" / "index.json").read_text())["shards"][0]
    assert list(shard["raw_data"]["hashes"]) == ["xxh64"]
    assert shard["compression"] is None
    assert names(tmp_path) == ["rejected.jsonl", "train"]
    assert names(tmp_path / "train") == ["00000", "index.json", "records.jsonl.gz"]


def test_first_sample_above_size_limit_makes_no_empty_shard(tmp_path: Path) -> None:
    summary = write_split(SAMPLES, str(tmp_path), "train", size_limit=1)
    assert summary.shards == 3
    assert read_samples(tmp_path) == SAMPLES


def test_exception_midway_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="midway"):
        write_split(failing(), str(tmp_path), "train")
    assert names(tmp_path) == []


def test_exception_midway_keeps_the_old_split(tmp_path: Path) -> None:
    write_split([*SAMPLES, BAD], str(tmp_path), "train")
    with pytest.raises(RuntimeError, match="midway"):
        write_split(failing(), str(tmp_path), "train", overwrite=True)
    assert read_samples(tmp_path) == SAMPLES
    assert len(read_rejected(tmp_path)) == 1


def test_not_empty_is_refused_unless_overwrite(tmp_path: Path) -> None:
    write_split(SAMPLES, str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        write_split(SAMPLES[:1], str(tmp_path), "train")
    write_split(SAMPLES[:1], str(tmp_path), "train", overwrite=True)
    assert read_samples(tmp_path) == SAMPLES[:1]


def test_overwrite_replaces_data_sets_only(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"no index\.json"):
        write_split(SAMPLES, str(tmp_path), "train", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "train")
    with pytest.raises(ValueError, match="link"):
        write_split(SAMPLES, str(tmp_path), "link", overwrite=True)
    assert (tmp_path / "train" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("split", ["../train", "/train", "a/../../b", ".", "rejected.jsonl"])
def test_split_stays_under_out(tmp_path: Path, split: str) -> None:
    with pytest.raises(ValueError, match="--split"):
        write_split(SAMPLES, str(tmp_path / "out"), split)
    assert names(tmp_path) == []


def test_rejected_rows_of_other_splits_stay(tmp_path: Path) -> None:
    write_split([*SAMPLES, BAD, BAD], str(tmp_path), "train")
    write_split([BAD, *SAMPLES], str(tmp_path), "eval")
    assert [row["split"] for row in read_rejected(tmp_path)] == ["train", "train", "eval"]
    summary = write_split([*SAMPLES, BAD], str(tmp_path), "train", overwrite=True)
    assert [item.reason for item in summary.rejected] == ["some reason"]
    assert sorted(row["split"] for row in read_rejected(tmp_path)) == ["eval", "train"]
    assert read_rejected(tmp_path)[0] == {
        "split": "eval", "id": "x", "source": "file: line 9", "reason": "some reason", "detail": "value"
    }  # fmt: skip


def test_strict_stops_at_the_first_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file: line 9.*some reason.*--strict"):
        write_split([SAMPLES[0], Note("mended", 2), BAD, SAMPLES[1], BAD], str(tmp_path), "train", strict=True)
    assert names(tmp_path) == ["rejected.jsonl"]
    assert len(read_rejected(tmp_path)) == 1


def test_nothing_good_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no record is usable; file: line 9 .*some reason: value"):
        write_split([BAD], str(tmp_path), "train")
    assert names(tmp_path) == ["rejected.jsonl"]


def test_summary_text(tmp_path: Path) -> None:
    text = str(write_split([*SAMPLES, BAD, Note("mended", 2), Note("mended", 3)], str(tmp_path), "train"))
    assert "3  (2 with an image, 1 known to hold nothing, 1 not annotated)" in text
    assert "2  (1 crowd regions)" in text
    assert "5  mended" in text
    assert "1  some reason" in text
