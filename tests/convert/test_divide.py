"""`--val-share`: what is held out depends on the image alone, and two parts appear as safely as one."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_helpers import Slow, picture, read_rejected, read_samples, run_main, write_json

from convert import write
from convert.__main__ import COMMANDS
from convert.divide import Chosen, Division, divide, group_of
from convert.items import Found
from convert.jsonl import find
from convert.shapes import Scene
from convert.store import staging_folder
from convert.write import convert_split, convert_splits
from recipe.data.split import ImageHashes, Split
from recipe.records import INDEX_FILE, RECORDS_FILE, parse_index, read_image_hashes

NUM_RECORDS = 30
SHARE = 0.3
BAD = 7  # the record with a box that cannot be used


def lines(numbers: Any = range(NUM_RECORDS)) -> list[dict[str, Any]]:
    """Records of images of their own, two of one image, a chat alone, and one without a file."""
    rows: list[dict[str, Any]] = []
    for number in numbers:
        box = [1, 1, 0 if number == BAD else 8, 8]
        objects = [{"bbox_2d": box, "desc": f"thing {number % 3}"}]
        rows.append({"id": f"r{number}", "images": [f"cam{number // 5}_{number}.jpg"], "objects": objects})
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "ho"}]
    return [*rows, {"id": "again", "images": ["copy.jpg"], "objects": []}, {"id": "chat", "messages": chat},
            {"id": "lost", "images": ["none.jpg"], "objects": []}]  # fmt: skip


def find_rows(folder: Path, rows: list[dict[str, Any]]) -> Found:
    path = folder / f"{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8]}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return find(path, folder / "images")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(NUM_RECORDS + 20):
        (tmp_path / "images" / f"cam{number // 5}_{number}.jpg").write_bytes(picture((20 + number, 10)))
    (tmp_path / "images" / "copy.jpg").write_bytes(picture((20, 10)))  # the bytes of the first
    return tmp_path


def convert(found: Found, out: Any, division: Division | None = None, **options: Any) -> Any:
    division = division or Division(SHARE)
    return convert_splits(found, str(out), "train", division, **{"part_records": 4, "size_limit": 2500, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def held_out(found: Found, num_workers: int = 1, share: float = SHARE, separator: str | None = None) -> set[str]:
    _, part = divide(found, Division(share, "val", separator), num_workers)
    return {entry.id for entry in part.entries}  # pyright: ignore[reportAttributeAccessIssue]


def by_hand(rows: list[dict[str, Any]], images: Path, share: float = SHARE) -> set[str]:
    held = set()
    for row in rows:
        if "messages" in row:
            content = json.dumps(row["messages"]).encode()
        elif not (images / "images" / row["images"][0]).exists():
            continue
        else:
            content = (images / "images" / row["images"][0]).read_bytes()
        if int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") < share * 2**64:
            held.add(row["id"])
    return held


def test_by_hand(images: Path) -> None:
    summaries = convert(find_rows(images, lines()), images / "out")
    held = by_hand(lines(), images)
    assert 0 < len(held) < NUM_RECORDS
    assert ("r0" in held) == ("again" in held)
    kept = [row["id"] for row in lines() if row["id"] not in ("lost", f"r{BAD}")]
    assert [sample.id for sample in read_samples(images / "out", "val")] == [name for name in kept if name in held]
    assert [sample.id for sample in read_samples(images / "out")] == [name for name in kept if name not in held]
    assert list(summaries) == ["val", "train"]
    assert summaries["val"].samples + summaries["train"].samples == len(kept)
    bad_part = "val" if f"r{BAD}" in held else "train"
    assert {(row["split"], row["id"]) for row in read_rejected(images / "out")} == {
        ("train", "lost"),
        (bad_part, f"r{BAD}"),
    }
    things = summaries["val"].captions + summaries["train"].captions
    assert things == {"thing 0": 10, "thing 1": 9, "thing 2": 10}


def test_training_holds_out_the_same(images: Path) -> None:
    """`val_fraction` of the whole set is `--val-share`, and each part is on one side for good."""
    found = find_rows(images, lines())
    convert_split(found, str(images / "whole"), "train")
    folder = images / "whole" / "train"
    hashes = [int(text, 16) for (text,) in read_image_hashes(folder / RECORDS_FILE, parse_index(folder / INDEX_FILE))]
    ids = [sample.id for sample in read_samples(images / "whole")]
    contents = {
        name: entry.origin()[1]
        for name, entry in zip([row["id"] for row in lines()], found.entries, strict=True)
        if name != "lost"
    }
    assert hashes == [int(hashlib.blake2b(contents[name], digest_size=8).hexdigest(), 16) for name in ids]
    for share in (0.2, SHARE, 0.5):
        is_held = Split(share, of_one_image(hashes)).is_validation
        held = held_out(found, share=share)
        assert {name for name, out in zip(ids, is_held, strict=True) if out} == held - {f"r{BAD}"}
    assert held_out(found, share=0.2) < held_out(found, share=0.5)


def test_nothing_else_changes_the_part(images: Path) -> None:
    """Neither order, other records, ids, names nor workers."""
    before = held_out(find_rows(images, lines()))
    assert held_out(find_rows(images, lines()[::-1]), num_workers=2) == before
    more = held_out(find_rows(images, [*lines(range(NUM_RECORDS + 20)), *lines()[:0]]))
    assert more & {row["id"] for row in lines()} == before
    renamed = [{**row, "id": f"x{row['id']}"} for row in lines()]
    assert held_out(find_rows(images, renamed)) == {f"x{name}" for name in before}
    for path in sorted((images / "images").iterdir()):
        path.rename(path.with_name(f"b{path.name}"))
    moved = [{**row, "images": [f"b{name}" for name in row["images"]]} if "images" in row else row for row in lines()]
    assert held_out(find_rows(images, moved)) == before


@pytest.mark.parametrize("num_workers", [1, 2])
def test_each_part_is_what_its_records_alone_give(images: Path, num_workers: int) -> None:
    convert(find_rows(images, lines()), images / "out", num_workers=num_workers)
    held = by_hand(lines(), images)
    for split, is_held in (("val", True), ("train", False)):
        alone = find_rows(images, [row for row in lines() if (row["id"] in held) == is_held])
        convert_split(alone, str(images / "alone"), split, part_records=4, size_limit=2500)
    alone = files(images / "alone")
    del alone["rejected.jsonl"]  # names another file as source
    assert {name: data for name, data in files(images / "out").items() if name != "rejected.jsonl"} == alone


@pytest.mark.parametrize(
    ("name", "separator", "group"),
    [
        ("cam1_0001.jpg", "_", "cam1"),
        ("a/2024_01_cam1_0001.jpg", "_", "a/2024_01_cam1"),
        ("x_jpg.rf.0123abc.jpg", ".rf.", "x_jpg"),
        ("set_a/0001.jpg", "_", None),  # of the file's name, not of its folder
        ("set_a/0001.jpg", "/", "set_a"),
        ("_1.jpg", "_", ""),
        ("17", "_", None),
    ],
)
def test_the_group_of_a_name(name: str, separator: str, group: str | None) -> None:
    assert group_of(name, separator) == group


def test_groups_stay_together(images: Path) -> None:
    found = find_rows(images, lines())
    held = held_out(found, separator="_")
    numbers = {int(name[1:]) // 5 for name in held if name.startswith("r")}
    assert {name for name in held if name.startswith("r")} == {f"r{n}" for n in range(NUM_RECORDS) if n // 5 in numbers}
    hashes = {f"cam{n}": int(hashlib.blake2b(f"cam{n}".encode(), digest_size=8).hexdigest(), 16) for n in range(6)}
    assert numbers == {n for n in range(6) if hashes[f"cam{n}"] < SHARE * 2**64}
    stays, _ = divide(found, Division(SHARE, "val", "_"))
    notes = {note.what: (note.count, note.examples) for note in stays.leading}  # pyright: ignore
    assert notes.pop(f"groups by '_', of which {len(numbers)} are held out") == (6, ())
    what = "records without '_' in their image's name: each is divided on its own"
    assert notes.pop(what) == (2, ("copy.jpg", "chat"))
    # copy.jpg has the bytes of cam0_0.jpg, whose group may be in the other part.
    assert (len(notes) == 1) == (("again" in held) != ("r0" in held))


def test_a_file_of_two_groups_is_noted(images: Path) -> None:
    names = [f"cam{number}_9.jpg" for number in range(6)]
    for name in names:
        (images / "images" / name).write_bytes(picture((99, 10)))
    rows = [{"id": name, "images": [name], "objects": []} for name in names]
    rows += [{"id": "other", "images": ["cam0_1.jpg"], "objects": []}]
    stays, held = divide(find_rows(images, rows), Division(SHARE, "val", "_"))
    _, note = stays.leading
    assert "whose image is also in the other part" in note.what  # pyright: ignore
    assert note.count == len({entry.id for entry in held.entries} - {"other"})  # pyright: ignore


def test_ids_name_groups_if_files_do_not(images: Path) -> None:
    rows = [{**row, "id": f"v{number // 10}-{number}"} for number, row in enumerate(lines()[:NUM_RECORDS])]
    hashes = {f"v{n}": int(hashlib.blake2b(f"v{n}".encode(), digest_size=8).hexdigest(), 16) for n in range(3)}
    first, second = sorted(hashes.values())[:2]
    held = held_out(find_rows(images, rows), share=(first + second) / 2**65, separator="-")
    (group,) = (name for name, value in hashes.items() if value == first)
    assert held == {row["id"] for row in rows if row["id"].startswith(group)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val-share", "0"], "--val-share 0: must be above 0 and below 1"),
        (["--val-share", "1"], "--val-share 1: must be above 0 and below 1"),
        (["--val-share=-.1"], "--val-share -0.1: must be"),
        (["--val-share", "1.5"], "--val-share 1.5: must be"),
        (["--val-share", "nan"], "--val-share nan: must be"),
        (["--val-share", ".3", "--val-split", "train"], "--val-split 'train' and --split 'train' must be two folders"),
        (["--val-share", ".3", "--val-split", "train/val"], "none in the other"),
        (["--val-share", ".3", "--val-split", "../val"], "--val-split '../val' must be the plain name"),
        (["--val-share", ".3", "--val-split", ""], "--val-split '' must be the plain name"),
        (["--val-split", "dev"], "--val-split 'dev' has no effect without --val-share"),
        (["--group-by-prefix", "_"], "--group-by-prefix '_' has no effect without --val-share"),
        (["--val-share", ".3", "--group-by-prefix", ""], "--group-by-prefix is empty"),
        (["--val-share", "1e-9"], "leaves nothing for val: it holds out 0 of 32 records. Raise it"),
        (["--val-share", ".999999999"], r"leaves nothing for the rest: it holds out 32 of 32 records.* Lower it"),
        (["--val-share", ".3", "--group-by-prefix", "#"], r"no image's name has it, such as 'cam0_0.jpg'"),
    ],
)
def test_bad_values(images: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str) -> None:
    (images / "a.jsonl").write_text("\n".join(map(json.dumps, lines())))
    common = ("--annotations", images / "a.jsonl", "--images", images / "images", "--out", images / "o")
    with pytest.raises(SystemExit, match=message if ".*" in message else re.escape(message)) as stopped:
        run_main(monkeypatch, "jsonl", *common, "--split", "train", *flags)
    assert str(stopped.value).count("\n") == 0
    assert not list(images.rglob(INDEX_FILE))


def test_no_record_is_usable(images: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to write: no record is usable; .*line 1: missing file"):
        convert(find_rows(images, lines()[-1:]), images / "out")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("teachers", "verify")])
def test_every_converter_has_the_flags(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_main(monkeypatch, name, "--help")
    assert all(flag in capsys.readouterr().out for flag in ("--val-share",)), name


def test_command_lines(images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """COCO, whose ids are numbers: groups are those of file names. And scenes, which have no file."""
    rows = [{"id": n, "file_name": f"cam{n // 5}_{n}.jpg"} for n in range(NUM_RECORDS)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 5, 5]} for n in range(NUM_RECORDS)]
    path = write_json(images / "i.json", {"images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "c"}]})
    run_main(
        monkeypatch, "coco", "--annotations", path, "--images", images / "images", "--out", images / "out",
        "--split", "train", "--val-share", "0.5", "--val-split", "dev", "--group-by-prefix", "_",
    )  # fmt: skip
    groups = [{int(s.id) // 5 for s in read_samples(images / "out", split)} for split in ("train", "dev")]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == set(range(6))
    shown = capsys.readouterr().out
    assert shown.index("out/train\n") < shown.index("out/dev\n")
    assert [int(count) for count in re.findall(r"captions .*\(c (\d+)\)", shown)] == [5 * len(g) for g in groups]
    run_main(
        monkeypatch, "shapes", "--num-samples", 20, "--image-size", 56, "--out", images / "scenes", "--split", "train",
        "--val-share", "0.3",
    )  # fmt: skip
    scenes = [sample.id for split in ("train", "val") for sample in read_samples(images / "scenes", split)]
    assert sorted(scenes) == [f"shapes-0-{n:06d}" for n in range(20)]


def test_strict_stops_before_a_part_appears(images: Path) -> None:
    with pytest.raises(ValueError, match="--strict"):
        convert(find_rows(images, lines()), images / "out", strict=True)
    assert not list((images / "out").glob("*/index.json"))


def test_a_part_that_is_there_is_refused_at_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_rows(images, lines())
    monkeypatch.setattr("convert.divide.divide", lambda *_: pytest.fail("an image was read"))
    for split in ("val", "train"):
        out = images / split
        convert_split(found, str(out), split)
        before = files(out)
        with pytest.raises(ValueError, match=rf"{split} is not empty"):
            convert(found, out)
        assert files(out) == before
    monkeypatch.undo()
    convert(found, images / "val", overwrite=True)
    convert(found, images / "train", overwrite=True)
    assert files(images / "val") == files(images / "train")


def test_two_conversions_do_not_mix(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.store._LOCK_SECONDS", 0.1)
    for split in ("val", "train"):
        staging = staging_folder(str(images / "out" / split))
        staging.mkdir(parents=True)
        with (staging / "lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(ValueError, match=rf"another conversion is writing .*{split}"):
                convert(find_rows(images, lines()), images / "out")
        staging.joinpath("lock").unlink()
        staging.rmdir()


def killed(work: Callable[[], object], until: Callable[[], bool]) -> None:
    """Run in a process that is killed once something is so."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    while not until():
        assert process.is_alive()
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_killed_and_begun_again_ends_the_same(images: Path, split: str, before: int, after: int) -> None:
    found = find_rows(images, lines())
    expected = convert(found, images / "whole")
    out = images / "out"
    slow = Found([Slow(entry, 0.03) for entry in found.entries], found.leading)
    staging = staging_folder(str(out / split))
    killed(lambda: convert(slow, out, num_workers=before), lambda: len(list(staging.glob("*/part.json"))) >= 2)
    assert not list(out.glob("*/index.json"))
    (out / "rejected.jsonl.1.partial").touch()  # as a kill may leave it
    summaries = convert(found, out, num_workers=after)
    assert summaries[split].kept >= 2
    assert {name: str(summary) for name, summary in summaries.items()} == {
        name: str(summary) for name, summary in expected.items()
    }
    assert files(out) == files(images / "whole")


def kill_at_rename(folder: str) -> None:
    """Die between the two parts: the first is there, the second is not."""
    rename = write.rename

    def rename_or_die(source: Path, target: Path) -> None:
        if target.name == folder:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    write.rename = rename_or_die  # pyright: ignore[reportPrivateImportUsage]


def test_killed_between_the_parts(images: Path) -> None:
    found, out = find_rows(images, lines()), images / "out"

    def work() -> None:
        kill_at_rename("train")
        convert(found, out)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (out / "val" / "index.json").is_file()
    assert not (out / "train").exists()
    inode = (out / "val").stat().st_ino
    other = Found(found.entries[:20])
    with pytest.raises(ValueError, match=r"val is not empty"):  # another set: the first part is not its own
        convert(other, out)
    assert convert(found, out)["train"].kept > 0
    assert (out / "val").stat().st_ino == inode, "what was published stays as it is"
    convert(found, images / "whole")
    assert files(out) == files(images / "whole")


def test_chosen_entries_are_a_sequence() -> None:
    scenes = [Scene(1, number) for number in range(6)]
    chosen = Chosen(scenes, np.array([1, 2, 5]))
    assert len(chosen) == 3
    assert [chosen[0], chosen[-1], *chosen[1:], *list(chosen)[:1], *chosen[::2]] == [
        scenes[number] for number in (1, 5, 2, 5, 1, 1, 5)
    ]


def test_three_parts(images: Path) -> None:
    """`val_fraction` 0.5 of what `--val-share` 0.3 left holds out the images from 0.3 to 0.5."""
    found = find_rows(images, lines())
    convert(found, images / "out")
    folder = images / "out" / "train"
    hashes = [int(text, 16) for (text,) in read_image_hashes(folder / RECORDS_FILE, parse_index(folder / INDEX_FILE))]
    ids = [sample.id for sample in read_samples(images / "out")]
    second = Split(0.5, of_one_image(hashes)).is_validation
    expected = (by_hand(lines(), images, 0.5) - by_hand(lines(), images, 0.3)) - {f"r{BAD}"}
    assert {name for name, is_held in zip(ids, second, strict=True) if is_held} == expected != set()
    assert not Split(0.3, of_one_image(hashes)).is_validation.any()


def of_one_image(hashes: list[int]) -> ImageHashes:
    return ImageHashes(np.array(hashes, dtype=np.uint64), np.array([], dtype=np.uint64), np.array([], dtype=np.int64))
