"""`recipe.gallery`: the page's data worked by hand, and the page itself in a real browser."""

import json
import os
from collections.abc import Iterator
from io import BytesIO
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from convert.writer import write_split
from recipe.gallery import (
    FALSE,
    IGNORED,
    main,
    matches_of,
    num_errors,
    page_data,
    parse,
    render,
    threshold_of,
    thumbnail,
    truths_of_coco,
    truths_of_mds,
)
from recipe.prediction_files import read_rows, write_rows
from recipe.schema import Object, Sample
from tests.chromium import Page, find_chromium, open_page

NASTY = "</script><img src=x onerror=alert(1)>&amp; \u2028 \"'猫"


def found(x: float, score: float, caption: str = "cat") -> dict[str, Any]:
    """A box of 10 x 10 pixels."""
    return {"box": [x, 0.0, x + 10, 10.0], "score": score, "caption": caption}


def true(x: float, caption: str = "cat", iscrowd: bool = False) -> Object:
    return Object((x, 0.0, x + 10, 10.0), caption, iscrowd)


def row(name: str, objects: list[dict[str, Any]] | None, file: str = "gone.png", **changes: Any) -> dict[str, Any]:
    entry = {"id": name, "file": file, "image_id": 1, "width": 100, "height": 50, "objects": objects}
    return {**entry, "answer": None, "answer_objects": None, "error": None, **changes}


def sample(name: str, *objects: Object) -> Sample:
    data = BytesIO()
    Image.new("RGB", (100, 50), name_colour(name)).save(data, "PNG")
    return Sample(name, data.getvalue(), 100, 50, objects)


def name_colour(name: str) -> tuple[int, int, int]:
    return (sum(name.encode()) % 256, 90, 160)


def test_matches_by_hand() -> None:
    truth = [true(0), true(20), true(40, iscrowd=True)]
    objects = [
        found(1, 0.9),  # IoU 9/11 with the first
        found(0, 0.8),  # the first again, taken
        found(26, 0.7),  # IoU 4/16 with the second
        found(23, 0.6),  # IoU 7/13 with the second
        found(41, 0.5),  # in the crowd
        found(80, 0.4),
    ]
    assert matches_of(objects, truth) == [0, FALSE, FALSE, 1, IGNORED, FALSE]
    assert matches_of([], truth) == []
    assert matches_of(objects[:1], []) == [FALSE]


def test_a_lower_score_takes_no_truth_from_a_higher_one() -> None:
    """So the page can filter matches by score: those of a prefix are a prefix of those of all."""
    truth = [true(0), true(6), true(12)]
    objects = [found(x, 0.9 - 0.1 * index) for index, x in enumerate((5, 0, 3, 9, 12, 1))]
    whole = matches_of(objects, truth)
    for length in range(len(objects)):
        assert matches_of(objects[:length], truth) == whole[:length]


def test_errors_at_a_threshold_and_which_pictures_are_kept() -> None:
    rows = [
        row("right", [found(0, 0.9)]),
        row("false", [found(80, 0.5), found(0, 0.9)]),
        row("missed", []),
        row("unknown", [found(0, 0.9)]),
        row("broken", None, error="no picture", width=None, height=None),
        row("text", None, answer="[]", answer_objects=[]),
    ]
    truths = {name: sample(name, true(0), true(30)) for name in ("right", "false", "missed", "text")}
    pictures = page_data(rows, truths, 0.3, 6, 64)["pictures"]
    assert [num_errors(picture, "head", 0.3) for picture in pictures] == [1, 2, 2, -1, float("inf"), 2]
    assert num_errors(pictures[1], "head", 0.6) == 1
    assert num_errors(pictures[0], "head", 0.95) == 2
    kept = page_data(rows, truths, 0.3, 3, 64)
    assert [picture["id"] for picture in kept["pictures"]] == ["false", "missed", "broken"]
    assert kept["left_out"] == [
        {
            "error": None,
            "num_wanted": num_wanted,
            "head": head and [{"match": match, "other_words": False, "score": 0.9} for match in head],
            "text": text,
        }
        for num_wanted, head, text in ((2, [0], None), (None, [IGNORED], None), (2, None, []))
    ]


def test_other_words_at_the_right_place() -> None:
    """Compared as the metrics compare captions; they are errors where words count, and else decide between equals."""
    captions = {"same": " STRASSE", "other": "street", "none": ""}
    rows = [row(name, [found(0, 0.9, caption)]) for name, caption in captions.items()]
    truths = {name: sample(name, true(0, "straße ")) for name in captions}
    pictures = page_data(rows, truths, 0.3, 3, 64)["pictures"]
    assert [picture["head"][0]["other_words"] for picture in pictures] == [False, True, True]
    assert [num_errors(picture, "head", 0.3) for picture in pictures] == [0, 0, 0]
    assert [num_errors(picture, "head", 0.3, words_count=True) for picture in pictures] == [0, 1, 1]
    assert [num_errors(picture, "head", 0.95, words_count=True) for picture in pictures] == [1, 1, 1]  # missed
    assert [picture["id"] for picture in page_data(rows, truths, 0.3, 2, 64)["pictures"]] == ["other", "none"]


def test_the_slider_begins_where_the_predictions_do() -> None:
    older, rows = [row("a", [])], [row("a", [], score_threshold=0.2), row("b", [], score_threshold=0.45)]
    assert (threshold_of(older, None), threshold_of(older, 0.0)) == (0.3, 0)
    assert (threshold_of(rows[:1], None), threshold_of(rows, None), threshold_of(rows, 0.45)) == (0.3, 0.45, 0.45)
    with pytest.raises(ValueError, match=r"threshold 0.3: .* what scored 0.45 or more; give at least that, or predict"):
        threshold_of(rows, 0.3)
    assert threshold_of([row("a", [], score_threshold=0.123457)], 0.12345678) == 0.123457  # the threshold, as written


def test_pictures_are_small_and_text_stays_text() -> None:
    data = BytesIO()
    Image.effect_noise((2000, 500), 50).save(data, "PNG")
    address = thumbnail(data.getvalue(), 200)
    assert address is not None and address.startswith("data:image/jpeg;base64,") and len(address) < 20_000
    assert thumbnail(b"no picture", 200) is None
    page = render({"pictures": [{"id": NASTY}]})
    assert page.count("</script>") == 2 and "<img" not in page.split('id="data">')[1]
    assert json.loads(page.split('id="data">')[1].split("</script>")[0])["pictures"][0]["id"] == NASTY


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """The page of four pictures on disk, written by the command line."""
    rows, images, annotations = [], [], []
    truths = {
        "good": [true(0), true(30)],
        "worst": [true(0), true(30), true(60), true(80, iscrowd=True)],
        "none": [],
        "other": [true(0)],
    }
    for number, (name, objects) in enumerate(truths.items(), start=1):
        (tmp_path / f"{name}.png").write_bytes(sample(name).image)
        images.append({"id": number, "file_name": f"{name}.png", "width": 100, "height": 50})
        annotations += [
            {"image_id": number, "category_id": 1, "bbox": [item.box[0], 0, 10, 10], "iscrowd": int(item.iscrowd)}
            for item in objects
        ]
    predicted = {
        "good": [found(0, 0.9), found(30, 0.6, "dog"), found(60, 0.2)],
        "worst": [found(45, 0.8), found(81, 0.7)],
        "none": [found(0, 0.4, NASTY)],
    }
    rows = [row(name, items, str(tmp_path / f"{name}.png")) for name, items in predicted.items()]
    answer = [{"box": [0.0, 0.0, 10.0, 10.0], "caption": "cat"}]
    rows[1] |= {"answer": NASTY, "answer_objects": answer}
    rows.append(row("broken", None, "broken.png", error=NASTY, width=None, height=None))
    (tmp_path / "predictions.json").write_text(json.dumps(rows))
    categories = [{"id": 1, "name": "cat"}]
    (tmp_path / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return tmp_path


def options(folder: Path, *more: str) -> list[str]:
    return ["--predictions", str(folder / "predictions.json"), "--out", str(folder / "page.html"), *more]


def test_command_line(gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options(gallery, "--truth", str(gallery / "instances.json"))
    assert main(parse(arguments)) == 1
    printed = capsys.readouterr()
    assert (
        "4 of 4 pictures" in printed.out
        and "1 pictures: not in" in printed.err
        and "folders count" in printed.err
        and "broken.png" in printed.err
    )
    with pytest.raises(ValueError, match="exists: give another --out, or --overwrite"):
        main(parse(arguments))
    rows = json.loads((gallery / "predictions.json").read_text())
    (gallery / "predictions.json").write_text(json.dumps([{**rows[0], "width": 99}]))
    with pytest.raises(ValueError, match=r"99 x 50 pixels, but its truth is of 100 x 50"):
        main(parse([*arguments, "--overwrite"]))
    (gallery / "predictions.json").write_text('[{"id": NaN}]')
    with pytest.raises(ValueError, match="a number in it is NaN"):
        main(parse([*arguments, "--overwrite"]))
    (gallery / "predictions.json").write_text(json.dumps([{**rows[0], "score_threshold": 0.5}]))
    with pytest.raises(ValueError, match=r"threshold 0.4: the predictions hold only what scored 0.5 or more"):
        main(parse([*arguments, "--overwrite", "--score-threshold", "0.4"]))


def test_a_page_that_cannot_be_written_is_told_before_the_work(gallery: Path) -> None:
    (gallery / "file").touch()
    (gallery / "predictions.json").unlink()  # nothing is read before
    for out, problem in (
        (gallery, r"is a folder: give a file as --out, such as .*gallery.html"),
        (gallery / "file" / "page.html", r"cannot write .*page.html \(.*\): give another --out"),
        (Path("/proc/page.html"), "cannot write /proc/page.html"),
    ):
        with pytest.raises(ValueError, match=problem):
            main(parse(options(gallery, "--out", str(out), "--overwrite")))


def test_a_page_appears_whole(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writing fails, the former page is still there."""
    (gallery / "page.html").write_text("former")

    def full(path: Path, text: str, **_: str) -> None:
        path.write_bytes(text[:100].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left on device.: give another --out"):
        main(parse(options(gallery, "--overwrite")))
    assert (gallery / "page.html").read_text() == "former"
    monkeypatch.undo()
    main(parse(options(gallery, "--overwrite")))
    assert (gallery / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(gallery.glob(".*"))


def test_a_file_name_that_is_not_utf_8(tmp_path: Path) -> None:
    odd = os.fsdecode(bytes(tmp_path / "stra") + b"\xdfe.png")
    Image.new("RGB", (60, 40)).save(odd)
    write_rows(tmp_path, [row("a", [], file=odd, image_id=1)])
    assert main(parse(options(tmp_path))) == 0
    assert r"stra\udcdfe.png" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_pictures_beside_the_predictions(
    gallery: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Found from where the command runs, else from the folder of the predictions; else it is told where was looked."""
    rows = [row(name, [], f"{name}.png") for name in ("good", "gone")]
    (gallery / "predictions.json").write_text(json.dumps(rows))
    monkeypatch.chdir(elsewhere := tmp_path_factory.mktemp("elsewhere"))
    assert main(parse(options(gallery))) == 1
    page = (gallery / "page.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [bool(item["image"]) for item in data["pictures"]] == [True, False]
    printed = capsys.readouterr().err
    assert "1 pictures" in printed and f"neither from {elsewhere}" in printed and f"nor from {gallery}" in printed
    assert "run it in the folder where predict.py ran: gone.png" in printed


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"objects": [{"score": 0.5, "caption": "cat"}]}, r"objects\[0\].box is None, not four numbers"),
        ({"objects": [found(0, 0.9), {"box": [0, 0, 9], "score": 0.5, "caption": "cat"}]}, r"objects\[1\].box is \["),
        ({"objects": [{"box": [0, 0, 5, 5], "score": 0.5}]}, r"objects\[0\].caption is None, not a text"),
        ({"objects": [{**found(0, 0.9), "score": "high"}]}, r"objects\[0\].score is 'high', not a number"),
        ({"objects": [{**found(0, 0.9), "score": True}]}, r"objects\[0\].score is True, not a number"),
        ({"answer_objects": [{"caption": "cat"}]}, r"answer_objects\[0\].box is None"),
        ({"objects": ["cat"]}, r"objects\[0\] is 'cat', not an object"),
        ({"objects": "cat"}, "objects is 'cat', not a list"),
        ({"score_threshold": "0.3"}, "score_threshold is '0.3', not a number"),
        ({"width": None}, "width is None, not a number"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps([row("good", [found(0, 0.9)]), {**row("bad", []), **changes}]))
    with pytest.raises(ValueError, match=rf"predictions.json: picture 'bad': {problem}.*: predict anew"):
        read_rows(path)


def test_rows_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps([row("a", []), row("a", [])]))
    with pytest.raises(ValueError, match="several pictures are called 'a'"):
        read_rows(path)
    path.write_text("[" + json.dumps(row("a", [], score_threshold=0.5)).replace("0.5", "1e999") + "]")
    with pytest.raises(ValueError, match="score_threshold is inf"):
        read_rows(path)


def test_truth_of_a_converted_data_set(gallery: Path) -> None:
    """Pictures are known by their bytes, whatever their samples are called, or by their names."""
    samples = [
        Sample("1", (gallery / "good.png").read_bytes(), 100, 50, (true(0),)),
        sample("worst", true(0), true(30)),
        sample("elsewhere", true(0)),
    ]
    write_split(samples, str(gallery / "data"), "val")
    (gallery / "worst.png").unlink()
    assert main(parse(options(gallery, "--data", str(gallery / "data"), "--split", "val"))) == 2
    page = (gallery / "page.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [len(item["truth"]) if item["truth"] else None for item in data["pictures"]] == [1, 2, None, None]
    assert data["pictures"][1]["image"].startswith("data:")  # of the data set


def test_no_truth_is_that_of_two_pictures(tmp_path: Path) -> None:
    rows = [row("x", [], "val/x.png"), row("x-2", [], "train/x.png")]
    alone = truths_of_coco(rows, {"train/x.png": sample("train", true(0))})
    assert {name: truth.id for name, truth in alone.items()} == {"x-2": "train"}
    both = r"val/x.png and train/x.png can both be x(.png)? of the data set: predict the pictures of one folder at a"
    with pytest.raises(ValueError, match=both):
        truths_of_coco(rows, {"x.png": sample("plain", true(0))})
    with pytest.raises(ValueError, match=both):
        truths_of_mds(rows, [sample("x", true(0))])

    twice = [row("x", [], "x.png"), row("x-2", [], "x.png")]
    assert len(truths_of_coco(twice, {"x.png": sample("plain", true(0))})) == 2

    # The same bytes are the same picture, of which the truth is the same; another of its name is not.
    files = {"a/x.png": "x", "b/x.png": "x", "c/x.png": "other"}
    for file, content in files.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_bytes(sample(content).image)
    rows = [row(file, [], str(tmp_path / file)) for file in files]
    assert sorted(truths_of_mds(rows, [sample("x", true(0))])) == ["a/x.png", "b/x.png"]

    # One that its bytes tell claims no name.
    by_bytes, by_name = Sample("1", sample("x").image, 100, 50, ()), Sample("x", sample("third").image, 100, 50, ())
    truths = truths_of_mds(rows, [by_name, by_bytes])
    assert {name: truth.id for name, truth in truths.items()} == {"a/x.png": "1", "b/x.png": "1", "c/x.png": "x"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium: install one, or name it in CHROMIUM")
    with open_page(program) as page:
        yield page


STATE = """({
  summary: byId('shown-pictures').textContent + byId('summary').textContent,
  cards: cards.slice().sort((a, b) => a.article.compareDocumentPosition(b.article) & 4 ? -1 : 1)
    .filter((card) => !card.article.hidden)
    .map((card) => [card.picture.id, card.article.checkVisibility() ? card.counts.textContent : null]),
  boxes: [...document.querySelectorAll('.box')].filter((box) => box.checkVisibility())
    .map((box) => [box.title, KINDS.filter((kind) => box.classList.contains(kind)).join()])
    .map((pair) => pair.join(': ')),
})"""


def place_of(browser: Page, element: str) -> tuple[float, float]:
    """Where the mouse hits an element, once that is in the window and laid out, which takes until the next frame."""
    browser.evaluate(
        f"({element}.scrollIntoView({{block: 'center'}}),"
        "new Promise((done) => requestAnimationFrame(() => setTimeout(done))))"
    )
    left, top = browser.evaluate(f"(({{left, top}}) => [left, top])({element}.getBoundingClientRect())")
    return left + 5, top + 5


def set_control(browser: Page, field: str, value: str, *, let_go: bool = True) -> None:
    """As a hand does it: `let_go` is False while the slider is still held."""
    how = "checked" if value in ("true", "false") else "value"
    quoted = value if how == "checked" else json.dumps(value)
    events = ("input", "change") if let_go else ("input",)
    dispatched = ", ".join(f"byId('{field}').dispatchEvent(new Event('{event}'))" for event in events)
    browser.evaluate(f"(byId('{field}').{how} = {quoted}, {dispatched})")


def test_page_in_a_browser(gallery: Path, browser: Page) -> None:
    main(parse(options(gallery, "--truth", str(gallery / "instances.json"))))
    browser.open(gallery / "page.html")

    def state() -> dict[str, Any]:
        return browser.evaluate(STATE)

    def choose(field: str, value: str) -> dict[str, Any]:
        set_control(browser, field, value)
        return state()

    first = state()
    assert first["cards"] == [
        ["broken", ""],
        ["worst", "3 missed, 1 false"],
        ["none", "0 missed, 1 false"],
        ["good", "0 missed, 0 false, 1 in other words"],
    ]
    assert first["summary"] == (
        "4 of 4 pictures shown · in the 3 with known truth: found 2 of 5 (40.0 %) · 3 missed"
        " · 2 false (precision 50.0 %) · 1 in other words, which count as found"
    )
    assert [box for box in first["boxes"] if not box.startswith("cat: ")] == [
        "cat 0.80: false", "cat 0.70: ignored", f"{NASTY} 0.40: false", "cat 0.90: right", "dog 0.60 ≠ cat: words",
    ]  # fmt: skip
    assert [first["boxes"].count(f"cat: {kind}") for kind in ("missed", "ignored", "right", "words")] == [3, 1, 1, 1]

    assert choose("threshold", "0.7")["cards"][1:] == [
        ["worst", "3 missed, 1 false"],
        ["good", "1 missed, 0 false"],
        ["none", "0 missed, 0 false"],
    ]
    assert [card[0] for card in choose("errors-only", "true")["cards"]] == ["broken", "worst", "good"]
    assert choose("threshold", "0.7")["summary"].startswith("3 of 4 pictures shown")
    lowest = choose("threshold", "0")
    assert dict(lowest["cards"])["good"] == "0 missed, 1 false, 1 in other words"
    text = choose("source", "text")
    assert dict(text["cards"])["worst"] == "2 missed, 0 false"


def test_words_count_where_one_says_so(gallery: Path, browser: Page) -> None:
    main(parse(options(gallery, "--truth", str(gallery / "instances.json"), "--score-threshold", "0.5")))
    browser.open(gallery / "page.html")
    set_control(browser, "errors-only", "true")
    assert [name for name, _ in browser.evaluate(STATE)["cards"]] == ["broken", "worst"]
    set_control(browser, "words-count", "true")
    state = browser.evaluate(STATE)
    assert [name for name, _ in state["cards"]] == ["broken", "worst", "good"]
    assert (
        "found 1 of 5 (20.0 %) · 3 missed · 1 false (precision 33.3 %) · 1 in other words, which count as errors"
        in (state["summary"])
    )
    label = browser.evaluate(
        "(() => { const {borderColor} = getComputedStyle(document.querySelector('.key.words'));"
        "return [...document.querySelectorAll('.words.box > .label')].map((label) => [label.textContent,"
        "label.checkVisibility(), getComputedStyle(label).backgroundColor === borderColor]); })()"
    )
    assert label == [["dog 0.60 ≠ cat", True, True], ["cat", True, True]]


def test_totals_are_of_all_pictures(gallery: Path, browser: Page) -> None:
    """Also of those that the page does not show; at every threshold, and of either source."""
    totals = {}
    for most in 4, 2:
        arguments = ("--truth", str(gallery / "instances.json"), "--overwrite", "--max-pictures", str(most))
        main(parse(options(gallery, *arguments)))
        browser.open(gallery / "page.html")
        totals[most] = [browser.evaluate("byId('summary').textContent")]
        for field, value in (("threshold", "0"), ("threshold", "0.7"), ("words-count", "true"), ("source", "text")):
            set_control(browser, field, value)
            totals[most].append(browser.evaluate("byId('summary').textContent"))
    assert totals[2] == totals[4] and len(set(totals[4])) == 5
    assert browser.evaluate("byId('shown-pictures').textContent") == (
        "2 of 4 pictures shown (2 of them are not in this page, but in the totals)"
    )


def test_the_page_counts_as_python_does(tmp_path: Path, browser: Page) -> None:
    random = Random(1)

    def boxes() -> list[dict[str, Any]]:
        return [found(random.uniform(0, 80), random.random(), random.choice(("cat", "dog"))) for _ in range(8)]

    rows = [row(str(number), boxes(), answer="[...]", answer_objects=boxes()) for number in range(12)]
    for item in (item for entry in rows for item in entry["answer_objects"]):
        del item["score"]
    rows += [row("unknown", boxes()), row("broken", None, error="no picture", width=None, height=None)]
    truths = {
        str(number): sample(str(number), *(true(random.uniform(0, 80), iscrowd=place == 5) for place in range(6)))
        for number in range(12)
    }
    page = page_data(rows, truths, 0.3, len(rows), 64)
    (tmp_path / "page.html").write_text(render(page), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    for source, threshold, words in product(("head", "text"), (0.0, 0.3, 0.8), (False, True)):
        set_control(browser, "source", source)
        set_control(browser, "threshold", str(threshold))
        set_control(browser, "words-count", "true" if words else "false")
        counted = browser.evaluate("cards.map((card) => Number.isFinite(card.errors) ? card.errors : null)")
        expected = [num_errors(picture, source, threshold, words) for picture in page["pictures"]]
        assert [float("inf") if number is None else number for number in counted] == expected
        assert len(set(expected)) > 4


def test_nothing_moves_while_the_slider_is_held(gallery: Path, browser: Page) -> None:
    main(parse(options(gallery, "--truth", str(gallery / "instances.json"))))
    browser.open(gallery / "page.html")
    set_control(browser, "errors-only", "true")
    before = browser.evaluate(STATE)
    set_control(browser, "threshold", "0.65", let_go=False)
    held = browser.evaluate(STATE)
    assert [name for name, _ in held["cards"]] == [name for name, _ in before["cards"]] == ["broken", "worst", "none"]
    assert dict(held["cards"])["none"] == "0 missed, 0 false" and "1 false" in held["summary"]
    set_control(browser, "threshold", "0.65")
    assert [name for name, _ in browser.evaluate(STATE)["cards"]] == ["broken", "worst", "good"]


def test_what_is_not_seen_costs_nothing(gallery: Path, browser: Page) -> None:
    """Cards outside the window are not laid out; pictures have their place before they are decoded."""
    main(parse(options(gallery)))
    browser.open(gallery / "page.html")
    assert browser.evaluate("getComputedStyle(document.querySelector('article')).contentVisibility") == "auto"
    image = "document.querySelector('img')"
    assert browser.evaluate(f"['width', 'height'].map((name) => {image}.getAttribute(name))") == ["100", "50"]


def test_pictures_by_their_captions(gallery: Path, browser: Page) -> None:
    """Those of the boxes that are shown, and of the truth; the totals stay those of all."""
    main(parse(options(gallery, "--truth", str(gallery / "instances.json"))))
    browser.open(gallery / "page.html")
    totals = browser.evaluate("byId('summary').textContent")

    def holding(words: str) -> list[str]:
        set_control(browser, "wanted-words", words)
        return [name for name, _ in browser.evaluate(STATE)["cards"]]

    assert holding(" CAT ") == ["worst", "good"] and holding("</SCRIPT>") == ["none"] and holding("dog") == ["good"]
    assert browser.evaluate("byId('shown-pictures').textContent") == "1 of 4 pictures shown"
    assert browser.evaluate("byId('summary').textContent") == totals
    set_control(browser, "threshold", "0.7")
    assert browser.evaluate(STATE)["cards"] == []
    assert holding("") == ["broken", "worst", "good", "none"]


def test_labels_lie_above_the_boxes_beside(gallery: Path, browser: Page) -> None:
    """A label that a later box crosses is read all the same."""
    rows = [
        row("a", [{"box": [40, 20, 60, 40], "score": 0.9, "caption": "cat"}, found(0, 0.8)], str(gallery / "good.png"))
    ]
    rows[0]["objects"][1]["box"] = [38, 8, 70, 30]
    truths = {"a": sample("a")}
    (gallery / "page.html").write_text(render(page_data(rows, truths, 0.3, 1, 64)), encoding="utf-8")
    browser.open(gallery / "page.html")
    label = "document.querySelector('.box > .label')"
    browser.evaluate(f"{label}.style.pointerEvents = 'auto'")
    x, y = place_of(browser, label)
    assert browser.evaluate(f"document.elementFromPoint({x}, {y}).textContent") == "cat 0.90"


def test_labels_that_would_hide_the_picture_wait_for_the_mouse(gallery: Path, browser: Page) -> None:
    rows = [row("a", [found(5 * place, 0.9 - 0.02 * place) for place in range(16)])]
    page = page_data(rows, {"a": sample("a")}, 0.3, 1, 64)
    (gallery / "page.html").write_text(render(page), encoding="utf-8")
    browser.open(gallery / "page.html")
    labels = "[...document.querySelectorAll('.label')].filter((label) => label.checkVisibility()).length"
    assert browser.evaluate(labels) == 0
    set_control(browser, "threshold", "0.65", let_go=False)
    assert browser.evaluate(labels) == 13
    set_control(browser, "threshold", "0.3")
    set_control(browser, "all-labels", "true")
    assert browser.evaluate(labels) == 16


def test_keys_and_touch_light_boxes_up(gallery: Path, browser: Page) -> None:
    main(parse(options(gallery, "--truth", str(gallery / "instances.json"))))
    browser.open(gallery / "page.html")
    browser.mouse("mouseMoved", 1, 1)

    def lit() -> list[str]:
        return browser.evaluate(
            "[...document.querySelectorAll('.lit')].map((one) => one.tagName + ' ' + (one.title || one.textContent))"
        )

    pair = ["DIV dog 0.60 ≠ cat", "LI dog 0.60 ≠ cat"]
    assert browser.evaluate("[...document.querySelectorAll('li')].every((line) => line.tabIndex === 0)")
    browser.evaluate("document.querySelector('li.words').focus()")
    assert lit() == pair
    browser.evaluate("document.activeElement.blur()")
    assert lit() == []
    x, y = place_of(browser, "document.querySelector('.box.words')")
    browser.mouse("mousePressed", x, y)
    browser.mouse("mouseReleased", x, y)
    browser.mouse("mouseMoved", 1, 1)
    assert lit() == pair, "a click stays where the mouse does not"
    browser.evaluate("byId('threshold').focus()")
    assert lit() == []


def test_the_slider_promises_nothing_that_is_not_there(gallery: Path, browser: Page) -> None:
    """Of pictures predicted from 0.37284 on, the page cannot be asked for less; older files are taken to hold all."""
    slider = "[Number(byId('threshold').min), Number(byId('threshold').value), byId('shown').textContent]"
    to_the_left = "(byId('threshold').value = 0, byId('threshold').dispatchEvent(new Event('input')))"
    main(parse(options(gallery)))
    browser.open(gallery / "page.html")
    assert browser.evaluate(slider) == [0, 0.3, "0.300"]
    rows = json.loads((gallery / "predictions.json").read_text())
    (gallery / "predictions.json").write_text(json.dumps([{**item, "score_threshold": 0.37284} for item in rows]))
    for more, first in ([], 0.37284), (["--score-threshold", "0.5"], 0.5):
        main(parse(options(gallery, "--overwrite", *more)))
        browser.open(gallery / "page.html")
        assert browser.evaluate(slider) == [0.37284, first, f"{first:.3f}"]
        browser.evaluate(to_the_left)
        assert browser.evaluate(slider) == [0.37284, 0.37284, "0.373"]


def test_page_is_harmless_and_shows_what_it_says(gallery: Path, browser: Page, tmp_path: Path) -> None:
    main(parse(options(gallery, "--truth", str(gallery / "instances.json"))))
    browser.open(gallery / "page.html")
    addresses = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert [address for address in addresses if not address.startswith(("data:", "file:"))] == []
    assert sum(address.startswith("file:") for address in addresses) == 1
    assert not [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert browser.evaluate("document.querySelectorAll('script').length") == 2
    assert browser.evaluate("document.querySelector('.failed').textContent") == NASTY
    assert browser.evaluate("document.querySelector('pre').textContent") == NASTY

    # A box lies where it is in the picture: the false one of "worst", from (45, 0) to (55, 10) of 100 x 50 pixels.
    place = browser.evaluate(
        "(() => { const box = document.querySelector('.box.false').getBoundingClientRect();"
        "const image = document.querySelector('.box.false').parentElement.querySelector('img').getBoundingClientRect();"
        "return [(box.left - image.left) / image.width, (box.top - image.top) / image.height,"
        "(box.right - image.left) / image.width, (box.bottom - image.top) / image.height]; })()"
    )
    assert place == pytest.approx([0.45, 0, 0.55, 0.2], abs=0.01)

    # The mouse over a line of the list lights up its box.
    x, y = place_of(browser, "[...document.querySelectorAll('li.right')].find((line) => line.checkVisibility())")
    assert browser.evaluate("document.querySelectorAll('.box.lit').length") == 0
    browser.mouse("mouseMoved", x, y)
    assert browser.evaluate("document.querySelectorAll('.box.lit').length") == 1
    browser.screenshot(tmp_path / "seen.png", 900, 700)
    colours = Image.open(tmp_path / "seen.png").convert("RGB").getcolors(1 << 20) or []
    assert (77, 163, 255) in {colour for _, colour in colours}, "no box is seen"
