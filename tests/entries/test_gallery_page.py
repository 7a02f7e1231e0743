"""`recipe/gallery.html`: the page itself in a real browser."""

import json
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from recipe.gallery import main, num_errors, page_data, render
from recipe.prediction.files import PredictedFile
from recipe.prediction.options import parse_gallery as parse
from recipe.schema import Sample
from tests.support.chromium import Page
from tests.support.gallery_cases import NASTY, entry, found, options, row, sample, true

STATE = """({
  summary: byId('shown-images').textContent + byId('summary').textContent,
  cards: cards.slice().sort((a, b) => a.article.compareDocumentPosition(b.article) & 4 ? -1 : 1)
    .filter((card) => !card.article.hidden)
    .map((card) => [card.image.id, card.article.checkVisibility() ? card.counts.textContent : null]),
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
        "4 of 4 images shown · in the 3 with known truth: found 2 of 5 (40.0 %) · 3 missed"
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
    assert choose("threshold", "0.7")["summary"].startswith("3 of 4 images shown")
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


def test_totals_are_of_all_images(gallery: Path, browser: Page) -> None:
    """Also of those that the page does not show; at every threshold, and of either source."""
    totals = {}
    for most in 4, 2:
        arguments = ("--truth", str(gallery / "instances.json"), "--overwrite", "--max-images", str(most))
        main(parse(options(gallery, *arguments)))
        browser.open(gallery / "page.html")
        totals[most] = [browser.evaluate("byId('summary').textContent")]
        for field, value in (("threshold", "0"), ("threshold", "0.7"), ("words-count", "true"), ("source", "text")):
            set_control(browser, field, value)
            totals[most].append(browser.evaluate("byId('summary').textContent"))
    assert totals[2] == totals[4] and len(set(totals[4])) == 5
    assert browser.evaluate("byId('shown-images').textContent") == (
        "2 of 4 images shown (2 of them are not in this page, but in the totals)"
    )


def test_the_page_counts_as_python_does(tmp_path: Path, browser: Page) -> None:
    random = Random(1)

    def boxes() -> list[dict[str, Any]]:
        return [found(random.uniform(0, 80), random.random(), random.choice(("cat", "dog"))) for _ in range(8)]

    rows = [row(str(number), boxes(), answer="[...]", answer_objects=boxes()) for number in range(12)]
    for item in (item for written in rows for item in written["answer_objects"]):
        del item["score"]
    rows += [row("unknown", boxes()), row("broken", None, error="no image", width=None, height=None)]
    truths = {
        str(number): sample(str(number), *(true(random.uniform(0, 80), iscrowd=place == 5) for place in range(6)))
        for number in range(12)
    }
    page = page_data([PredictedFile.from_json(item) for item in rows], truths, 0.3, len(rows), 64)
    (tmp_path / "page.html").write_text(render(page), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    for source, threshold, words in product(("head", "text"), (0.0, 0.3, 0.8), (False, True)):
        set_control(browser, "source", source)
        set_control(browser, "threshold", str(threshold))
        set_control(browser, "words-count", "true" if words else "false")
        counted = browser.evaluate("cards.map((card) => Number.isFinite(card.errors) ? card.errors : null)")
        expected = [num_errors(image, source, threshold, words) for image in page["images"]]
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
    """Cards outside the window are not laid out; images have their place before they are decoded."""
    main(parse(options(gallery)))
    browser.open(gallery / "page.html")
    assert browser.evaluate("getComputedStyle(document.querySelector('article')).contentVisibility") == "auto"
    image = "document.querySelector('img')"
    assert browser.evaluate(f"['width', 'height'].map((name) => {image}.getAttribute(name))") == ["100", "50"]


def test_images_by_their_captions(gallery: Path, browser: Page) -> None:
    """Those of the boxes that are shown, and of the truth; the totals stay those of all."""
    main(parse(options(gallery, "--truth", str(gallery / "instances.json"))))
    browser.open(gallery / "page.html")
    totals = browser.evaluate("byId('summary').textContent")

    def holding(words: str) -> list[str]:
        set_control(browser, "wanted-words", words)
        return [name for name, _ in browser.evaluate(STATE)["cards"]]

    assert holding(" CAT ") == ["worst", "good"] and holding("</SCRIPT>") == ["none"] and holding("dog") == ["good"]
    assert browser.evaluate("byId('shown-images').textContent") == "1 of 4 images shown"
    assert browser.evaluate("byId('summary').textContent") == totals
    set_control(browser, "threshold", "0.7")
    assert browser.evaluate(STATE)["cards"] == []
    assert holding("") == ["broken", "worst", "good", "none"]


def animals() -> tuple[list[PredictedFile], dict[str, Sample]]:
    """Eight images of boxes at random places with random names, some with objects below the threshold or a crowd."""
    draw, rows, truths = Random(3), [], {}
    names = ["cat", "dog", "fox", NASTY]
    for name in "abcdefgh":
        boxes = [
            found(15 * place, draw.uniform(0.3, 1), draw.choice(names)) for place in range(6) if draw.random() < 0.7
        ]
        below = [found(15 * place, draw.uniform(0.05, 0.3), "") for place in range(6) if draw.random() < 0.3]
        rows.append(entry(name, boxes, score_threshold=0.3, least_score=0.05, objects_below=below))
        wanted = [true(15 * place + draw.choice((0, 1, 5)), draw.choice(names[:3])) for place in range(6)]
        truths[name] = sample(name, *wanted[draw.randrange(4) :], true(85, "dog", iscrowd=True))
    return rows, truths


def test_the_errors_of_a_class_are_those_of_the_report(gallery: Path, browser: Page) -> None:
    """At the slider's first value, whatever the order; and its images come first that have most of them."""
    rows, truths = animals()
    page = page_data(rows, truths, 0.4, 8, 64)
    (gallery / "page.html").write_text(render(page), encoding="utf-8")
    browser.open(gallery / "page.html")
    worst = [dict(map(tuple, entries)) for entries in page["classes"]["worst"]]
    assert len(worst) == 3 and all(worst)
    for number, errors in enumerate(worst):
        counted = browser.evaluate(
            f"cards.map((card) => [card.image.id, classErrors(card.image, 'head', {page['threshold']}, {number})])"
        )
        assert {name: count for name, count in counted if count} == errors
        set_control(browser, "class", str(number))
        shown = [name for name, _ in browser.evaluate(STATE)["cards"]]
        assert [errors.get(name, 0) for name in shown] == sorted(errors.values(), reverse=True) + [0] * (
            len(shown) - len(errors)
        )
    set_control(browser, "class", "3")  # a name that no truth has
    assert browser.evaluate("byId('of-class').firstChild.textContent").startswith(f"{NASTY}: ".casefold())


def test_a_box_without_a_caption_finds_its_truth(gallery: Path, browser: Page) -> None:
    """Below the threshold of the predictions: no error of a class, as it is none of the image."""
    low = entry("low", [], score_threshold=0.3, least_score=0.05, objects_below=[found(0, 0.1, ""), found(50, 0.1, "")])
    (gallery / "page.html").write_text(render(page_data([low], {"low": sample("low", true(0))}, 0.3, 1, 64)))
    browser.open(gallery / "page.html")
    errors = "[0.3, 0.05].map((threshold) => classErrors(cards[0].image, 'head', threshold, 0))"
    assert browser.evaluate(errors) == [1, 0]


def test_a_class_is_chosen_by_a_click(gallery: Path, browser: Page) -> None:
    rows = [
        entry("near", [found(0, 0.9), found(30, 0.8, "dog"), found(60, 0.7), found(80, 0.7)]),
        entry("far", [found(0, 0.9, "dog"), found(60, 0.5, "dog")]),
        entry("gone", [found(0, 0.9, "dog")]),
    ]
    truths = {"near": sample("near", true(0), true(30, "dog")), "far": sample("far", true(0), true(30))}
    truths["gone"] = sample("gone", true(0, "dog"), true(30, "dog"))
    (gallery / "page.html").write_text(render(page_data(rows, truths, 0.3, 2, 64)), encoding="utf-8")
    browser.open(gallery / "page.html")
    browser.evaluate("byId('classes').open = true")
    table = "[...byId('{}').rows].map((row) => [...row.cells].map((cell) => cell.textContent).join('|'))"
    assert browser.evaluate(table.format("scores"))[0] == "class|truths|AP|AP50|recall"
    assert browser.evaluate(table.format("scores"))[1].startswith("1 cat|3|0.337|0.337|0.333")
    assert browser.evaluate(table.format("confusion")) == [
        "true, taken for|1|2|missed",
        "1 cat|1|1|1",
        "2 dog||2|1",
        "nothing there|2|1|",
    ]
    x, y = place_of(browser, "byId('scores').querySelectorAll('button')[1]")
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, x, y)
    assert [name for name, _ in browser.evaluate(STATE)["cards"]] == ["far", "near"], "near's dog is right"
    line = "dog: missed 1, cat taken for it 1, nothing taken for it 1"
    found_line = browser.evaluate("byId('of-class').firstChild.textContent")
    assert sorted(found_line.removeprefix("dog: ").split(", ")) == sorted(line.removeprefix("dog: ").split(", "))
    assert browser.evaluate("byId('of-class').lastChild.textContent").startswith("most errors: far (2)gone (1, not in")
    top = "cards.find((card) => card.image.id === 'far').article.getBoundingClientRect().top"
    x, y = place_of(browser, "byId('of-class').querySelector('button')")
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, x, y)
    assert browser.evaluate(f"Math.abs({top} - byId('bar').offsetHeight) < 30 || scrollY > 0")
    set_control(browser, "class", "")
    assert browser.evaluate("byId('of-class').textContent + document.querySelectorAll('tr.chosen').length") == "0"


def test_labels_lie_above_the_boxes_beside(gallery: Path, browser: Page) -> None:
    """A label that a later box crosses is read all the same."""
    objects = [found(0, 0.9) | {"box": [40, 20, 60, 40]}, found(0, 0.8) | {"box": [38, 8, 70, 30]}]
    rows = [entry("a", objects, str(gallery / "good.png"))]
    truths = {"a": sample("a")}
    (gallery / "page.html").write_text(render(page_data(rows, truths, 0.3, 1, 64)), encoding="utf-8")
    browser.open(gallery / "page.html")
    label = "document.querySelector('.box > .label')"
    browser.evaluate(f"{label}.style.pointerEvents = 'auto'")
    x, y = place_of(browser, label)
    assert browser.evaluate(f"document.elementFromPoint({x}, {y}).textContent") == "cat 0.90"


def test_labels_that_would_hide_the_image_wait_for_the_mouse(gallery: Path, browser: Page) -> None:
    rows = [entry("a", [found(5 * place, 0.9 - 0.02 * place) for place in range(16)])]
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
    """Of images predicted from 0.37284 on, the page cannot be asked for less; older files are taken to hold all."""
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

    # A box lies where it is in the image: the false one of "worst", from (45, 0) to (55, 10) of 100 x 50 pixels.
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
