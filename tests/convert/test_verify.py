"""`convert.verify` finds every kind of damage, and none where there is none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, run_main

from convert.shapes import draw_scene
from convert.verify import verify
from convert.write import write_split
from recipe.records import RECORDS_FILE, join_parts, to_record, write_part
from recipe.schema import Sample

CHAT = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
SAMPLES = [*(draw_scene(1, index, 56) for index in range(5)), Sample("chat", b"", 0, 0, None, CHAT)]
SECOND = "00000/shard.00001.mds"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of two samples."""
    summary = write_split(SAMPLES, str(tmp_path), "train", size_limit="7kb", hashes=["md5", "xxh64"])
    assert summary.shards == 3
    return tmp_path / "train"


def problems(folder: Path, decode: bool = False) -> list[str]:
    return list(verify(folder, decode, num_workers=2))


def damage_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_a_whole_set_has_no_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problems(folder, decode=True) == []
    run_main(monkeypatch, "verify", "--local", folder.parent, "--split", "train", "--decode", "--num-workers", 1)
    assert "3 shards, 6 samples, no problem" in capsys.readouterr().out


def test_command_line_exits_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / SECOND).unlink()
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, "verify", "--local", folder)
    assert stop.value.code == 1
    assert f"{SECOND}: is missing: convert the data set again" in capsys.readouterr().out


@pytest.mark.parametrize("place", [5, -5])
def test_a_flipped_byte_fails_every_checksum(folder: Path, place: int) -> None:
    data = bytearray((folder / SECOND).read_bytes())
    data[place] ^= 1
    (folder / SECOND).write_bytes(data)
    found = problems(folder)
    assert [SECOND in line for line in found] == [True] * len(found)
    assert [name for name in ("md5", "xxh64") if any(f"{name} is" in line for line in found)] == ["md5", "xxh64"]


def test_a_truncated_shard(folder: Path) -> None:
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data[:-1])
    [line] = problems(folder)
    assert f"{SECOND}: holds {len(data) - 1} bytes, the index says {len(data)}" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("shards"), "not an index of shards"),
        (lambda index: index["shards"].clear(), "lists no MDS shards"),
        (lambda index: index["shards"][1].update(samples=0), "lists no MDS shards"),
        (lambda index: index["shards"][1].update(format="json"), "lists no MDS shards"),
        (lambda index: index["shards"][1].update(raw_data=None), "not an index of shards"),
        (lambda index: index["shards"][1]["raw_data"].update(basename="../index.json"), "outside its folder"),
        (lambda index: index["shards"][1].update(zip_data={"basename": "../x", "bytes": 1, "hashes": {}}), "outside"),
        (lambda index: index["shards"][1]["raw_data"].update(basename="/etc/hostname"), "outside its folder"),
        (lambda index: index["shards"][1]["raw_data"].update(basename="a/../../b"), "outside its folder"),
        (lambda index: index["shards"][1]["column_encodings"].append("pkl"), "a column of pickles, which can run"),
        (lambda index: index["shards"][1].update(index["shards"][0]), "one file twice"),
        (lambda index: index["shards"][1]["raw_data"].pop("hashes"), "not an index of shards"),
    ],
)
def test_a_wrong_index(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    damage_index(folder, change)
    [line] = problems(folder)
    assert message in line


def test_no_index(folder: Path) -> None:
    (folder / "index.json").write_text("{")
    assert "not an index of shards" in problems(folder)[0]
    (folder / "index.json").unlink()
    assert "name the folder of a converted data set" in problems(folder)[0]


def test_wrong_counts_and_columns(folder: Path) -> None:
    damage_index(folder, lambda index: index["shards"][1].update(samples=3))
    assert any(f"{SECOND}: sample 2: " in line for line in problems(folder))
    damage_index(folder, lambda index: index["shards"][1].update(samples=2, column_names=["id"]))
    assert any(SECOND in line for line in problems(folder))


def test_an_unknown_checksum(folder: Path) -> None:
    damage_index(folder, lambda index: index["shards"][1]["raw_data"]["hashes"].update(crc0="0"))
    assert any("unknown checksum crc0" in line for line in problems(folder))


def test_the_sidecar(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    records = [to_record(sample) for sample in SAMPLES]
    records[3]["objects"][0]["caption"] = "something else"
    write_part(folder / "part", records)
    join_parts(folder / RECORDS_FILE, [folder / "part"], index)
    [line] = problems(folder)
    assert f"differs from sample 1 of {SECOND} ({SAMPLES[3].id!r})" in line
    damage_index(folder, lambda index: index["shards"][1]["raw_data"]["hashes"].pop("md5"))
    assert "written for other shards" in problems(folder)[0]
    (folder / RECORDS_FILE).write_bytes(b"none")
    assert "cannot be read" in problems(folder)[0]
    (folder / RECORDS_FILE).unlink()
    assert f"{RECORDS_FILE}: is missing" in problems(folder)[0]


def test_pictures(tmp_path: Path) -> None:
    """Written without the converters' checks."""
    samples = [
        Sample("good", picture(), 20, 10, None),
        Sample("cut", picture((200, 200))[:-200], 200, 200, None),
        Sample("turned", picture(), 10, 20, None),
        Sample("text", b"not a picture", 5, 5, None),
    ]
    write_split(samples, str(tmp_path), "train")
    assert problems(tmp_path / "train") == []
    found = problems(tmp_path / "train", decode=True)
    assert ["sample 1: " in found[0], "sample 2: " in found[1], "sample 3: " in found[2]] == [True] * len(found)
    write_split([Sample("none", b"", 5, 5, None)], str(tmp_path), "none")
    assert "5x5 with 0 bytes" in problems(tmp_path / "none")[0]
