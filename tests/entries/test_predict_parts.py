"""`composer -n N recipe/predict.py`: processes share the images, kills lose no finished part; images of a store."""

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from convert.shapes import draw_scene
from recipe.predict import main
from recipe.prediction.files import PredictedFile
from recipe.prediction.options import parse
from recipe.prediction.parts import PARTS_FOLDER, Parts, open_parts
from recipe.prediction.remote import RemoteImage
from tests.launches.launch import run_composer, start
from tests.support.s3_server import S3Server

NUM_IMAGES = 22
OPTIONS = ("--batch-size", "2", "--part-images", "4", "--score-threshold", "0.001", "--max-new-tokens", "3")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fourth is cut off."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(NUM_IMAGES):
        data = draw_scene(seed=2, index=index, image_size=56 + 28 * (index % 3), min_objects=2).image
        (folder / f"{index:02}.png").write_bytes(data[: len(data) // 2] if index == 3 else data)
    return folder


@pytest.fixture(scope="module")
def expected(trained_checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of one process without parts."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(parse(arguments(trained_checkpoint, out, str(images), options=(*OPTIONS[:2], *OPTIONS[4:])))) == 1
    return files_of(out)


def arguments(checkpoint: Path, out: Path, *named: str, options: tuple[str, ...] = OPTIONS) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--out", str(out), *options, *named]


def files_of(out: Path) -> dict[str, bytes]:
    assert all(path.is_file() for path in out.iterdir()), "no folder is left"
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_parts_change_nothing(
    trained_checkpoint: Path,
    images: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(parse(arguments(trained_checkpoint, out, str(images)))) == 1
    assert files_of(out) == expected
    assert len(expected) == NUM_IMAGES - 1 + 2, "a drawing per usable image, and two files"
    assert "failed: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"already holds predictions\.json"):
        main(parse(arguments(trained_checkpoint, out, str(images))))


def test_a_stopped_command_goes_on(
    trained_checkpoint: Path,
    images: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, parts = tmp_path / "out", tmp_path / "out" / PARTS_FOLDER
    command = parse(arguments(trained_checkpoint, out, str(images)))
    with monkeypatch.context() as patched:
        write, calls = Parts.write, list[slice]()

        def full(self: Parts, piece: slice, entries: Sequence[PredictedFile]) -> None:
            calls.append(piece)
            if len(calls) == 3:
                raise ValueError("no space left")
            write(self, piece, entries)

        patched.setattr(Parts, "write", full)
        with pytest.raises(ValueError, match="no space left"):
            main(command)
    done = {path: path.stat().st_mtime_ns for path in parts.glob("0*.json")}
    assert len(done) == 2
    for changed, named in (
        (("--score-threshold", "0.5"), "--score-threshold"),
        (("--batch-size", "4"), "--batch-size"),
        (("--part-images", "8"), "images of a part"),
        (("--no-drawings",), "--no-drawings"),
    ):
        with pytest.raises(ValueError, match=f"another command \\({named} changed\\)"):
            main(parse([*arguments(trained_checkpoint, out, str(images)), *changed]))
    with pytest.raises(ValueError, match=r"another command \(images changed\)"):
        main(parse(arguments(trained_checkpoint, out, str(images / "00.png"))))
    assert {path: path.stat().st_mtime_ns for path in parts.glob("0*.json")} == done
    assert main(command) == 1
    assert files_of(out) == expected


def test_killed_after_the_results_were_written(
    trained_checkpoint: Path,
    images: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = parse(arguments(trained_checkpoint, tmp_path, str(images)))
    with monkeypatch.context() as patched:
        patched.setattr(Parts, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(command)
    assert main(command) == 1
    assert files_of(tmp_path) == expected


def test_overwrite_begins_anew_only_for_another_command(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    parts = open_parts(tmp_path, {"--prompt": "x"}, names, 2, overwrite=True, rank=0, world_size=1)
    parts.write(slice(0, 2), [])
    again = open_parts(tmp_path, {"--prompt": "x"}, names, 2, overwrite=True, rank=0, world_size=1)
    assert again.to_do() == [slice(2, 4)]
    other = open_parts(tmp_path, {"--prompt": "y"}, names, 2, overwrite=True, rank=0, world_size=1)
    assert other.to_do() == [slice(0, 2), slice(2, 4)]


def test_every_part_belongs_to_one_process(tmp_path: Path) -> None:
    for world_size in (1, 2, 3, 7):
        own = [Parts(tmp_path, 23, 4, rank, world_size).to_do() for rank in range(world_size)]
        assert sorted(piece.start for pieces in own for piece in pieces) == [0, 4, 8, 12, 16, 20]


def test_a_drawing_of_another_command_stays(trained_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "05.png").write_bytes(b"drawn by hand")
    with pytest.raises(ValueError, match=r"already holds 05\.png"):
        main(parse(arguments(trained_checkpoint, tmp_path, str(images))))
    assert (tmp_path / "05.png").read_bytes() == b"drawn by hand"


@pytest.mark.parametrize("value", ["3", "0"])
def test_parts_are_whole_batches(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--checkpoint", "c", "--out", "o", "--batch-size", "2", "--part-images", value, "a.png"])
    assert f"--part-images {value}: must be" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("world_size", [2, 0])
def test_two_processes_killed_twice(
    world_size: int, trained_checkpoint: Path, images: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Finished by two, or by one alone (0: without a launcher): the same files, byte for byte, as of one process."""
    out, parts = tmp_path / "out", tmp_path / "out" / PARTS_FOLDER
    command = arguments(trained_checkpoint, out, str(images))
    for number in (1, 3):
        running = start(2, "recipe/predict.py", *command, log=tmp_path / "log")
        deadline = time.monotonic() + 120
        while len(list(parts.glob("0*.json"))) < number and time.monotonic() < deadline:
            time.sleep(0.001)
        running.signal(signal.SIGKILL)
        running.wait()
        assert number <= len(list(parts.glob("0*.json"))) < 6, running.output()
    launch = run_composer(world_size, "recipe/predict.py", *command, check=False)
    assert launch.returncode == 1, launch.output
    assert "failed: " in launch.output and launch.output.count("predictions.json") == 1
    assert files_of(out) == expected


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_a_process_that_starts_late_and_has_nothing_to_do(
    trained_checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    """The first one may have written everything before the second one looks."""
    late = tmp_path / "late.py"
    late.write_text(
        "import os, sys, time\n"
        "from recipe.predict import main, parse\n"
        "time.sleep(15 * int(os.environ['RANK']))\n"
        "sys.exit(main(parse(sys.argv[1:])))\n"
    )
    out = tmp_path / "out"
    run_composer(2, late, *arguments(trained_checkpoint, out, str(images / "00.png"), options=("--batch-size", "2")))
    assert {"00.png", "predictions.json"} < files_of(out).keys()


@pytest.mark.slow
def test_images_of_a_store(
    trained_checkpoint: Path,
    images: Path,
    expected: dict[str, bytes],
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "notes.txt").write_text("no image")
    (tmp_path / "more" / ".hidden.png").write_bytes(b"")
    address = s3.upload(images, "pictures", "some/set")
    s3.upload(tmp_path / "more", "pictures", "some/set")
    out = tmp_path / "out"
    assert main(parse(arguments(trained_checkpoint, out, address))) == 1
    found = files_of(out)
    rows, local = json.loads(found.pop("predictions.json")), json.loads(expected["predictions.json"])
    assert [row.pop("file") for row in rows] == [f"{address}/{index:02}.png" for index in range(NUM_IMAGES)]
    for row in local:
        del row["file"]
    assert rows == local
    assert found == {name: data for name, data in expected.items() if name != "predictions.json"}
    one = tmp_path / "one"
    missing = [f"{address}/05.png", f"{address}/none.png"]
    assert main(parse(arguments(trained_checkpoint, one, *missing))) == 1
    rows = json.loads((one / "predictions.json").read_text())
    assert [row["error"] is None for row in rows] == [True, False] and "cannot read the file" in rows[1]["error"]
    with pytest.raises(ValueError, match="s3://pictures/nothing holds no image"):
        main(parse(arguments(trained_checkpoint, one, "s3://pictures/nothing")))


def test_an_address_is_kept(tmp_path: Path) -> None:
    image = RemoteImage("s3://bucket/some/a b.png")
    assert str(image) == "s3://bucket/some/a b.png" and image.stem == "a b"
    with pytest.raises(ValueError, match="other://bucket cannot be opened"):
        main(parse(arguments(tmp_path, tmp_path / "out", "other://bucket/a")))
