"""The command lines: what they import, and what they answer to a newcomer's mistakes."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, run_main, write_json
from streaming.base.hashing import get_hashes

from convert.__main__ import COMMANDS
from convert.items import MOST_CAPTIONS, Found, Summary
from convert.shapes import Scene
from convert.write import HASHES, convert_split
from recipe.schema import Object, Sample

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "streaming", "transformers", "composer")
# Runs `main` with the arguments that follow, and then says on stderr what it imported.
SCRIPT = f"""
import importlib, sys
module = importlib.import_module("convert." + sys.argv[1])
sys.argv = sys.argv[1:]
try:
    if len(sys.argv) > 1:
        module.main()
finally:
    print("imported", [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_importing_and_help_need_no_torch(name: str) -> None:
    result = start(name)
    assert (result.returncode, result.stderr) == (0, "imported []\n")
    result = start(name, "--help")
    assert (result.returncode, result.stderr) == (0, "imported []\n")
    assert result.stdout.startswith(f"usage: python -m convert.{name} ")
    options = result.stdout.partition("\noptions:\n")[2]
    required = [word for word in result.stdout.partition("[-h]")[0].split() if word.startswith("--")]
    assert required, "the usage begins with what is required"
    assert [line.split()[0] for line in options.splitlines() if line.startswith("  -")][: len(required)] == required


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-such-flag"], "the following arguments are required: --annotations, --images, --out, --split"),
        (["--annotations", "no.json", "--images", ".", "--out", "o", "--split", "s"], "error: no.json does not exist"),
        (["--annotations", ".", "--images", ".", "--out", "o", "--split", "s"], "error: . is a folder: give a COCO"),
        (
            ["--annotations", "README.md", "--images", ".", "--out", "o", "--split", "s"],
            "README.md looks like plain text, not a COCO file",
        ),
    ],
)
def test_bad_arguments_need_no_torch(arguments: list[str], message: str) -> None:
    result = start("coco", *arguments)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "imported []" in result.stderr


def test_a_target_that_is_taken_and_an_unknown_checksum_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "file").touch()
    arguments = ["shapes", "--num-samples", 2, "--out", tmp_path, "--split", "train"]
    result = start(*arguments)
    assert "is not empty: choose another --out or --split" in result.stderr
    assert "imported []" in result.stderr
    result = start(*arguments, "--hashes", "crc0")
    assert "--hashes ['crc0'] are unknown: choose from" in result.stderr
    assert "imported []" in result.stderr
    assert get_hashes() == HASHES


def test_the_package_lists_its_commands() -> None:
    command = [sys.executable, "-m", "convert"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with_main = {path.stem for path in (ROOT / "convert").glob("*.py") if "\ndef main()" in path.read_text()}
    assert with_main == set(COMMANDS)
    assert all(f"python -m convert.{name} " in text for name in with_main)


def test_home_is_expanded_in_every_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in --out=~/x, of which shells leave the ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jpg").write_bytes(picture())
    (tmp_path / "a.jsonl").write_text('{"images": ["a.jpg"], "objects": []}\n')
    run_main(monkeypatch, "jsonl", "--annotations=~/a.jsonl", "--images=~/", "--out=~/out", "--split=train")
    run_main(monkeypatch, "verify", "--local=~/out", "--split=train")
    assert (tmp_path / "out/train/index.json").is_file()
    with pytest.raises(SystemExit, match="3 teachers asked, but only 0 samples"):
        run_main(monkeypatch, "teachers", "--local=~/out", "--split=train", "--out=~/pool", "--num-samples=3")


def test_the_first_unusable_record_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(picture())
    image = {"id": 1, "file_name": "a.jpg"}
    path = write_json(tmp_path / "a.json", {"images": [image], "annotations": [], "categories": []})
    target = ["--out", tmp_path / "out", "--split", "train"]
    with pytest.raises(SystemExit, match=rf"a\.json: image 0 \(id '1'\): missing file: '{tmp_path}/a\.jpg'"):
        run_main(monkeypatch, "coco", "--annotations", path, "--images", tmp_path, *target)
    (tmp_path / "a.csv").write_text("image,xmin,ymin\na.jpg,1,2\n")
    with pytest.raises(
        SystemExit, match=r"a\.csv looks like a CSV table, not JSON lines for convert\.jsonl: make it one of"
    ):
        run_main(monkeypatch, "jsonl", "--annotations", tmp_path / "a.csv", "--images", tmp_path, *target)
    with pytest.raises(SystemExit, match=r"no\.jsonl does not exist: give a file of JSON lines"):
        run_main(monkeypatch, "jsonl", "--annotations", tmp_path / "no.jsonl", "--images", tmp_path, *target)
    with pytest.raises(SystemExit, match=r"no does not exist: give a folder of Pascal VOC"):
        run_main(monkeypatch, "voc", "--annotations", tmp_path / "no", "--images", tmp_path, *target)


def test_the_summary_counts_captions() -> None:
    summary = Summary()
    for number in range(12):
        objects = tuple(Object((0, 0, 1, 1), f"kind {kind}") for kind in range(number + 1))
        summary.add(Sample(str(number), b"x", 9, 9, (*objects, Object((0, 0, 1, 1), "crowd", iscrowd=True))))
    again = Summary.from_json(json.loads(json.dumps(summary.to_json())))
    assert again == summary
    assert "        12  (kind 0 12, kind 1 11, kind 2 10" in str(again)
    assert "kind 9 3, and 2 more)" in str(again)
    assert "crowd " not in str(again).partition("captions")[2]
    for number in range(MOST_CAPTIONS + 50):
        again.add(Sample(str(number), b"x", 9, 9, (Object((0, 0, 1, 1), f"free text {number}"),)))
    assert f"> {MOST_CAPTIONS}  (different ones)" in str(again)
    assert len(again.captions) == MOST_CAPTIONS + 1
    summary.merge(again)
    assert f"> {MOST_CAPTIONS}  (different ones)" in str(summary)


def test_a_full_disk_before_the_first_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, records: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    images = [Sample(str(index), b"x" * 2**20, 9, 9, None) for index in range(100)]
    monkeypatch.setattr(Scene, "read", lambda scene: iter([images[scene.index]]))
    monkeypatch.setattr("convert.parts.write_part", refuse)
    with pytest.raises(OSError, match=r"GiB are free; all 100 records need about 0.10 GiB. Make room"):
        convert_split(Found([Scene(1, index, 56) for index in range(100)]), str(tmp_path), "train", num_workers=1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    def refuse(path: Path, records: Any) -> None:
        if path.parent.name == "00002":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_part(path, records)

    from convert.parts import write_part

    scenes = Found([Scene(1, index, 56) for index in range(8)])
    with monkeypatch.context() as patch:
        patch.setattr("convert.parts.write_part", refuse)
        with pytest.raises(OSError, match="the disk of") as raised:
            convert_split(scenes, str(tmp_path), "train", part_records=2, num_workers=num_workers)
    message = str(raised.value)
    assert f"the disk of {tmp_path} is full" in message
    assert "parts of 4 that are missing need about 0.0" in message
    assert "run the same command again: it continues after the finished parts" in message
    assert convert_split(scenes, str(tmp_path), "train", part_records=2).kept >= 2
