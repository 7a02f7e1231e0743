"""`recipe.gallery`: the page's data worked by hand, and its command line."""

import json
import os
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convert.write import write_split
from recipe.gallery import (
    class_data,
    main,
    num_errors,
    page_data,
    render,
    threshold_of,
    thumbnail,
    truths_of_coco,
    truths_of_mds,
)
from recipe.metrics.gather import IGNORED
from recipe.prediction.files import write_entries
from recipe.prediction.options import parse_gallery as parse
from recipe.schema import Sample
from tests.support.gallery_cases import NASTY, entry, found, options, row, sample, true


def test_errors_at_a_threshold_and_which_images_are_kept() -> None:
    rows = [
        entry("right", [found(0, 0.9)]),
        entry("false", [found(80, 0.5), found(0, 0.9)]),
        entry("missed", []),
        entry("unknown", [found(0, 0.9)]),
        entry("broken", None, error="no image", width=None, height=None),
        entry("text", None, answer="[]", answer_objects=[]),
    ]
    truths = {name: sample(name, true(0), true(30)) for name in ("right", "false", "missed", "text")}
    images = page_data(rows, truths, 0.3, 6, 64)["images"]
    assert [num_errors(image, "head", 0.3) for image in images] == [1, 2, 2, -1, float("inf"), 2]
    assert num_errors(images[1], "head", 0.6) == 1
    assert num_errors(images[0], "head", 0.95) == 2
    kept = page_data(rows, truths, 0.3, 3, 64)
    assert [image["id"] for image in kept["images"]] == ["false", "missed", "broken"]
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
    rows = [entry(name, [found(0, 0.9, caption)]) for name, caption in captions.items()]
    truths = {name: sample(name, true(0, "straße ")) for name in captions}
    images = page_data(rows, truths, 0.3, 3, 64)["images"]
    assert [image["head"][0]["other_words"] for image in images] == [False, True, True]
    assert [num_errors(image, "head", 0.3) for image in images] == [0, 0, 0]
    assert [num_errors(image, "head", 0.3, words_count=True) for image in images] == [0, 1, 1]
    assert [num_errors(image, "head", 0.95, words_count=True) for image in images] == [1, 1, 1]  # missed
    assert [image["id"] for image in page_data(rows, truths, 0.3, 2, 64)["images"]] == ["other", "none"]


def test_classes_by_hand() -> None:
    """As `report_categories`: a cat taken for a dog, a dog missed, a cat seen in nothing, and three found."""
    dogs = [found(0, 0.9, "dog"), found(30, 0.8, "Dog"), found(60, 0.7)]
    rows = [entry("a", dogs), entry("b", [found(0, 0.6), found(30, 0.5, "fox")]), entry("c", [found(0, 0.9, "owl")])]
    truths = {
        "a": replace(sample("other name", true(0), true(30, "dog"), true(80, "dog ")), width=0, height=0),
        "b": sample("b", true(0, "Cat"), true(30, "dog", iscrowd=True)),
    }
    page = page_data([*rows, entry("broken", None, error="no image")], truths, 0.3, 3, 64)
    classes = page["classes"]
    assert classes["names"] == ["cat", "dog"], "what is in a crowd is ignored"
    assert [scores[0] for scores in classes["scores"]] == [2, 2]
    assert classes["scores"][1][1:] == pytest.approx([51 / 101 / 2, 51 / 101 / 2, 0.5])
    assert sorted(classes["confusion"]) == [[-1, 0, 1], [0, 0, 1], [0, 1, 1], [1, -1, 1], [1, 1, 1]]
    assert classes["worst"] == [[["a", 2]], [["a", 2]]]
    [shown] = [image for image in page["images"] if image["id"] == "a"]
    assert [item["class"] for item in shown["head"]] == [1, 1, 0]
    assert class_data(rows[2:], truths, "head", 0.3) is None, "without a truth"
    higher = class_data(rows[:1], truths, "head", 0.85)
    assert higher is not None and higher["names"] == ["dog", "cat"]
    assert higher["confusion"] == [[0, -1, 2], [1, 0, 1]]


def test_classes_of_text_answers_and_of_class_scores() -> None:
    """Without a head the answers' boxes count; with scores of classes AP counts each of an object's classes."""
    answer = {"answer": "[]", "answer_objects": [{"box": [0.0, 0.0, 10.0, 10.0], "caption": "cat"}]}
    truths = {"a": sample("a", true(0))}
    text = page_data([entry("a", None, **answer)], truths, 0.3, 3, 64)["classes"]
    assert (text["scores"], text["confusion"]) == ([[1, 1.0, 1.0, 1.0]], [[0, 0, 1]])
    unsure = {**found(0, 0.9, "dog"), "classes": {"dog": 0.6, "cat": 0.4}}
    head = page_data([entry("a", [unsure])], truths, 0.3, 3, 64)["classes"]
    assert (head["names"], head["scores"], head["confusion"]) == (["cat", "dog"], [[1, 1.0, 1.0, 1.0]], [[0, 1, 1]])


def test_the_slider_begins_where_the_predictions_do() -> None:
    older, rows = [entry("a", [])], [entry("a", [], score_threshold=0.2), entry("b", [], score_threshold=0.45)]
    assert (threshold_of(older, None), threshold_of(older, 0.0)) == (0.3, 0)
    assert (threshold_of(rows[:1], None), threshold_of(rows, None), threshold_of(rows, 0.45)) == (0.3, 0.45, 0.45)
    with pytest.raises(ValueError, match=r"threshold 0.3: .* only scores from 0.45; give at least that, or predict"):
        threshold_of(rows, 0.3)
    assert threshold_of([entry("a", [], score_threshold=0.123457)], 0.12345678) == 0.123457  # the threshold, as written


def test_the_slider_goes_below_the_threshold() -> None:
    """Down to the least score that all images hold; there a box can find a truth or be false, but it has no words."""
    below: dict[str, Any] = {"score_threshold": 0.4, "least_score": 0.05}
    low = entry("low", [found(0, 0.9, "dog")], **below, objects_below=[found(30, 0.1, ""), found(80, 0.2, "")])
    truths = {"low": sample("low", true(0), true(30))}
    page = page_data([low], truths, 0.4, 1, 64)
    assert (page["least"], page["captions_from"]) == (0.05, 0.4)
    (image,) = page["images"]
    assert [item["score"] for item in image["head"]] == [0.9, 0.2, 0.1]
    assert [item["other_words"] for item in image["head"]] == [True, False, False]
    assert [num_errors(image, "head", at) for at in (0.4, 0.15, 0.05)] == [1, 2, 1]
    assert num_errors(image, "head", 0.05, words_count=True) == 2
    assert (threshold_of([low], None), threshold_of([low], 0.1)) == (0.4, 0.1)
    older = entry("older", [], score_threshold=0.3)
    assert page_data([low, older], truths, 0.4, 1, 64)["least"] == 0.3
    with pytest.raises(ValueError, match=r"threshold 0.01: .* only scores from 0.05"):
        threshold_of([low], 0.01)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["/users/ann/set/a/x.png", "/users/ann/set/b/x.png", "/users/ann/set/y.png"], ["a/x.png", "b/x.png", "y.png"]),
        (["/users/ann/x.png"], ["x.png"]),
        (["../ann/x.png", "../ann/y.png"], ["x.png", "y.png"]),
    ],
)
def test_a_page_names_no_folder_above_the_images(files: list[str], names: list[str]) -> None:
    page = page_data([entry(file, [], file) for file in files], {}, 0.3, 9, 64)
    assert sorted(image["file"] for image in page["images"]) == names
    assert "ann" not in json.dumps([image["file"] for image in page["images"]])


def test_images_are_small_and_text_stays_text() -> None:
    data = BytesIO()
    Image.effect_noise((2000, 500), 50).save(data, "PNG")
    address = thumbnail(data.getvalue(), 200)
    assert address is not None and address.startswith("data:image/jpeg;base64,") and len(address) < 20_000
    assert thumbnail(b"no image", 200) is None
    page = render({"images": [{"id": NASTY}]})
    assert page.count("</script>") == 2 and "<img" not in page.split('id="data">')[1]
    assert json.loads(page.split('id="data">')[1].split("</script>")[0])["images"][0]["id"] == NASTY


def test_command_line(gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options(gallery, "--truth", str(gallery / "instances.json"))
    assert main(parse(arguments)) == 1
    printed = capsys.readouterr()
    assert (
        "4 of 4 images" in printed.out
        and "1 images: not in" in printed.err
        and "folders count" in printed.err
        and "broken.png" in printed.err
    )
    with pytest.raises(ValueError, match="exists: give another --out, or --overwrite"):
        main(parse(arguments))
    rows = json.loads((gallery / "predictions.json").read_text())
    (gallery / "predictions.json").write_text(json.dumps([{**rows[0], "width": 99}]))
    with pytest.raises(ValueError, match=r"99 x 50 pixels, but its truth has 100 x 50"):
        main(parse([*arguments, "--overwrite"]))
    (gallery / "predictions.json").write_text('[{"id": NaN}]')
    with pytest.raises(ValueError, match="a number in it is NaN"):
        main(parse([*arguments, "--overwrite"]))
    (gallery / "predictions.json").write_text(json.dumps([{**rows[0], "score_threshold": 0.5}]))
    with pytest.raises(ValueError, match=r"threshold 0.4: the predictions hold only scores from 0.5"):
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

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recipe.records.os.fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left on device.: give another --out"):
        main(parse(options(gallery, "--overwrite")))
    assert (gallery / "page.html").read_text() == "former"
    assert not list(gallery.glob("*.partial"))
    monkeypatch.undo()
    main(parse(options(gallery, "--overwrite")))
    assert (gallery / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(gallery.glob(".*"))


def test_a_file_name_that_is_not_utf_8(tmp_path: Path) -> None:
    odd = os.fsdecode(bytes(tmp_path / "stra") + b"\xdfe.png")
    Image.new("RGB", (60, 40)).save(odd)
    write_entries(tmp_path, [entry("a", [], file=odd, image_id=1)])
    assert main(parse(options(tmp_path))) == 0
    assert r"stra\udcdfe.png" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_images_beside_the_predictions(
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
    assert [bool(item["thumbnail"]) for item in data["images"]] == [True, False]
    printed = capsys.readouterr().err
    assert "1 images" in printed and f"neither from {elsewhere}" in printed and f"nor from {gallery}" in printed
    assert "run this command in the folder where predict.py ran: gone.png" in printed


def test_truth_of_a_converted_data_set(gallery: Path) -> None:
    """Images are known by their bytes, whatever their samples are called, or by their names."""
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
    assert [len(item["truth"]) if item["truth"] else None for item in data["images"]] == [1, 2, None, None]
    assert data["images"][1]["thumbnail"].startswith("data:")  # of the data set


def test_no_truth_is_that_of_two_images(tmp_path: Path) -> None:
    rows = [entry("x", [], "val/x.png"), entry("x-2", [], "train/x.png")]
    alone = truths_of_coco(rows, {"train/x.png": sample("train", true(0))})
    assert {name: truth.id for name, truth in alone.items()} == {"x-2": "train"}
    both = r"val/x.png and train/x.png can both be x(.png)? of the data set: predict the images of one folder at a"
    with pytest.raises(ValueError, match=both):
        truths_of_coco(rows, {"x.png": sample("plain", true(0))})
    with pytest.raises(ValueError, match=both):
        truths_of_mds(rows, [sample("x", true(0))])

    twice = [entry("x", [], "x.png"), entry("x-2", [], "x.png")]
    assert len(truths_of_coco(twice, {"x.png": sample("plain", true(0))})) == 2

    # The same bytes are the same image, of which the truth is the same; another of its name is not.
    files = {"a/x.png": "x", "b/x.png": "x", "c/x.png": "other"}
    for file, content in files.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_bytes(sample(content).image)
    rows = [entry(file, [], str(tmp_path / file)) for file in files]
    assert sorted(truths_of_mds(rows, [sample("x", true(0))])) == ["a/x.png", "b/x.png"]

    # One that its bytes tell claims no name.
    by_bytes, by_name = Sample("1", sample("x").image, 100, 50, ()), Sample("x", sample("third").image, 100, 50, ())
    truths = truths_of_mds(rows, [by_name, by_bytes])
    assert {name: truth.id for name, truth in truths.items()} == {"a/x.png": "1", "b/x.png": "1", "c/x.png": "x"}
