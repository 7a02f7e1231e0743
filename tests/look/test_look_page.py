"""The page of `recipe.look`: from the command line to a real browser."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convert.divide import Division
from convert.jsonl import find
from convert.write import convert_split, convert_splits
from recipe.look.__main__ import Look, main
from recipe.look.options import parse
from recipe.look.page import without_folders
from tests.support.chromium import Page
from tests.support.gallery_cases import NASTY

ROOT = Path(__file__).resolve().parents[2]


def write_set(folder: Path) -> Path:
    """A set of all kinds of samples, in parts `train` and `val`; return its folder."""
    (folder / "images").mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(24):
        size = [(600, 400), (60, 700), (900, 50), (40, 40)][number % 4]
        data = BytesIO()
        Image.new("RGB", size, (10 * number, 90, 160)).save(data, "PNG")
        (folder / "images" / f"{number}.png").write_bytes(data.getvalue())
        objects = [{"bbox_2d": [i % 20, 2, i % 20 + 9, 30], "desc": NASTY if i else "cat"} for i in range(number % 7)]
        rows.append({"id": f"s{number}", "images": [f"{number}.png"], "objects": objects})
    chat = [{"role": "user", "content": f"<image>{NASTY}"}, {"role": "assistant", "content": "ho " * 900}]
    rows.append({"id": "chat", "images": ["1.png"], "messages": chat})
    rows += [{"id": f"text{n}", "messages": [{"role": "user", "content": f"{NASTY} {n}"}, *chat[1:]]} for n in range(9)]
    rows.append({"id": "bad", "images": ["0.png"], "objects": [{"bbox_2d": [5, 5, 2, 9], "desc": "cat"}]})
    rows.append({"id": "gone", "images": [f"/{folder.name}/elsewhere/none.png"], "objects": []})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    convert_splits(find(folder / "a.jsonl", folder / "images"), str(folder / "set"), "train", Division(0.3))
    return folder / "set"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("look"))


def look(data: Path, out: Path, *more: object) -> Look:
    return main(parse([str(data), "--split", "train", "--out", str(out), *map(str, more)]))


@pytest.fixture(scope="module")
def page(data: Path, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: str) -> Path:
    out = tmp_path_factory.mktemp("page") / "page.html"
    look(data, out, "--checkpoint", tiny_checkpoint)
    return out


def test_the_page(data: Path, page: Path, tmp_path: Path, tiny_checkpoint: str) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert NASTY not in text
    assert str(data.parent.parent) not in text
    assert "none.png" in text
    assert "set / train" in text
    for title in (
        "At random",
        "Most objects",
        "Smallest objects",
        "Known to hold nothing",
        "Not annotated",
        "Text only",
    ):
        assert f"<h2>{title}</h2>" in text, title
    assert "Crowd regions" not in text, "a list without an image is left out"
    assert "tokens on average" in text
    look(data, tmp_path / "again.html", "--checkpoint", tiny_checkpoint)
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_only_the_shown_images_are_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streaming.base.format.mds.reader import MDSReader

    read, get_item = list[int](), MDSReader.__getitem__
    monkeypatch.setattr(MDSReader, "__getitem__", lambda self, key: (read.append(key), get_item(self, key))[1])
    found = look(data, tmp_path / "page.html", "--num-images", 1)
    shown = {place for best in (found.contents.spread, *found.contents.shown.values()) for place, _ in best.found()}
    assert sorted(read) == sorted(shown)
    assert len(shown) <= 6 < found.contents.images


def test_console(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = look(data, tmp_path / "page.html", "--config", ROOT / "yamls/joint.yaml")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"set / train: {found.contents.samples} samples: {found.contents.images} images, ")
    assert [line.removeprefix("  ! ") for line in shown[1:-1]] == found.warnings
    assert shown[-1].startswith(f"{tmp_path / 'page.html'} (")
    assert found.contents.spec.max_pixels == 802816
    assert "checkpoint of the config, Qwen/Qwen2.5-VL-3B-Instruct, cannot be read" in found.tokens_unknown
    other = look(data, tmp_path / "other.html", "--config", ROOT / "yamls/joint.yaml", "--max-pixels", 7840)
    assert other.contents.spec.max_pixels == 7840
    assert other.contents.spec.min_pixels == 3136
    assert other.contents.reduced > found.contents.reduced


def test_images_of_two_splits(data: Path, tmp_path: Path) -> None:
    """`--val-share` shares none; a part that was made by hand does."""
    assert not any("also here" in warning for warning in look(data, tmp_path / "a.html").warnings)
    out = tmp_path / "set"
    for split in ("train", "val"):
        convert_split(find(data.parent / "a.jsonl", data.parent / "images"), str(out), split)
    # The chat's image is also that of another sample; equal texts do not occur.
    warnings = look(out, tmp_path / "b.html").warnings
    assert any(warning.startswith("33 images of val are also here") for warning in warnings), warnings
    assert any(warning.startswith("1 sample repeats the image or chat of another") for warning in warnings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--split", "train"], "none does not exist: give the --out folder of a conversion"),
        (["SET"], "SET holds no index.json, so it is not a converted data set: give --split train or val"),
        (["SET", "--split", "test"], "SET/test holds no index.json, so it is not a converted data set: give --split"),
        (["s3://bucket/set", "--split", "train"], "s3://bucket/set is an address: give a folder"),
        (["SET", "--split", "train", "--config", "none.yaml"], "none.yaml"),
        (["SET", "--split", "train", "--checkpoint", "none"], "neither a folder nor the hub has a processor"),
        (["SET", "--split", "train", "--max-pixels", "99"], "--max-pixels 99 is below image.min_pixels 3136: raise it"),
        (["SET", "--split", "train", "--out", "SET/a.jsonl"], "a.jsonl exists: give another --out, or --overwrite"),
    ],
)
def test_mistakes(data: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "set").symlink_to(data)
    (data / "a.jsonl").touch()
    place = str(tmp_path / "set")
    with pytest.raises(ValueError, match=r"\w") as raised:
        main(parse([argument.replace("SET", place) for argument in arguments]))
    assert message.replace("SET", place) in str(raised.value)
    assert str(raised.value).count("\n") == 0


def test_damaged_sets(data: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        convert_split(find(data.parent / "a.jsonl", data.parent / "images"), str(tmp_path / name), "train")
        return tmp_path / name / "train"

    def expect(folder: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as raised:
            look(folder.parent, tmp_path / "page.html")
        assert str(raised.value).count("\n") == 0

    folder = copy("index")
    (folder / "index.json").write_text("{")
    expect(folder, r"index.json is truncated or not an index .*: convert the data set again")
    (folder / "index.json").write_text('{"version": 2, "shards": []}')
    expect(folder, "holds no sample: convert the data set again")
    folder = copy("records")
    (folder / "records.jsonl.gz").write_bytes(b"x")
    expect(folder, r"records.jsonl.gz cannot be read .*: convert the data set again")
    (folder / "records.jsonl.gz").unlink()
    expect(folder, r"has no records.jsonl.gz next to its index.json: convert the data set again")
    folder = copy("shard")
    (folder / "00000/shard.00000.mds").unlink()
    expect(folder, r"shard.00000.mds cannot be read .*python -m convert.verify --local .* says what is wrong")
    assert not (tmp_path / "page.html").exists()


def test_command_line(data: Path, tmp_path: Path) -> None:
    """A mistake is one line without a traceback, before torch is imported."""
    code = "import runpy, sys; sys.argv = ['look', *sys.argv[1:]]; runpy.run_module('recipe.look', run_name='__main__')"
    end = f"try:\n  {code}\nfinally:\n  print('torch' in sys.modules)"
    command = [sys.executable, "-c", end, str(data)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (run.returncode, run.stdout) == (1, "False\n")
    assert run.stderr.startswith(f"error: {data} holds no index.json")
    assert run.stderr.count("\n") == 1


def test_paths_lose_their_folders() -> None:
    assert without_folders("no '/data/my set/a b.jpg' or /x/y.jpg: see image/png, https://a.b/c, 3/4") == (
        "no 'a b.jpg' or y.jpg: see image/png, https://a.b/c, 3/4"
    )


MEASURES = """(() => {
  const all = [...document.querySelectorAll('.card, figure, h1, h2, .warnings')];
  const boxes = all.map((element) => element.getBoundingClientRect());
  const beyond = (a, b) => a.right <= b.left + .5 || a.bottom <= b.top + .5;
  const apart = (a, b) => beyond(a, b) || beyond(b, a);
  return {
    overlaps: boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => !apart(a, b))).length,
    wide: document.documentElement.scrollWidth > innerWidth,
    blank: [...document.images].filter((image) => !image.naturalWidth).length,
    images: document.images.length,
    bars: [...document.querySelectorAll('td svg rect')].map((e) => e.getBoundingClientRect().width),
  };
})()"""


@pytest.mark.parametrize("width", [1400, 500])
def test_in_a_browser(page: Path, browser: Page, tmp_path: Path, width: int) -> None:
    browser.open(page)
    browser.screenshot(tmp_path / "page.png", width, 1000)
    found = browser.evaluate(MEASURES)
    assert (found["overlaps"], found["wide"], found["blank"]) == (0, False, 0)
    assert found["images"] > 10
    assert max(found["bars"]) > 40
    requests = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert not [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
