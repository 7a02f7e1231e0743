"""`recipe.Detector`: what `predict.py` finds, from Python, in any form of an image and from several threads."""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convert.shapes import draw_scene
from recipe import Detector
from recipe.export import main as export
from recipe.export import parse as parse_export
from recipe.predict import main as predict
from recipe.prediction.options import parse
from recipe.schema import DetectedObject, Prediction


@pytest.fixture(scope="module")
def exported(trained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector") / "model"
    export(parse_export(["--checkpoint", str(trained_checkpoint), "--out", str(folder)]))
    return folder


@pytest.fixture(scope="module")
def detector(exported: Path) -> Detector:
    return Detector.from_pretrained(exported, batch_size=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of several sizes and formats; the last one is stored turned."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for index, (size, suffix) in enumerate([(90, "png"), (140, "jpg"), (200, "webp"), (112, "jpg"), (84, "png")]):
        scene = draw_scene(seed=9, index=index, image_size=size, min_objects=2)
        (folder / "scene").write_bytes(scene.image)
        image = Image.open(folder / "scene").convert("RGB").crop((0, 0, size, size - 20))
        exif = Image.Exif()
        if index == 4:
            exif[0x112] = 6
        image.save(folder / f"{index}.{suffix}", exif=exif)
        paths.append(folder / f"{index}.{suffix}")
    return paths


def rows(checkpoint: Path, out: Path, pictures: list[Path], options: str = "") -> list[dict[str, Any]]:
    arguments = ["--checkpoint", str(checkpoint), "--out", str(out), "--no-drawings", *options.split()]
    assert predict(parse([*arguments, *map(str, pictures)])) == 0
    return json.loads((out / "predictions.json").read_text())


def made(prediction: Prediction) -> dict[str, Any]:
    return {name: value for name, value in prediction.to_json().items() if name != "id"}


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ("", {}),
        ("--answer both --score-threshold 0.3", {"answer": "both", "threshold": 0.3}),
        ("--answer text", {"answer": "text"}),
        ("--classes star,circle --nms-iou 0.5", {"classes": ["star", "circle"], "nms_iou": 0.5}),
        ("--prompt Where? --expression star", {"prompt": "Where?", "expressions": ["star"]}),
        ("--tile 120", {"tile": 120}),
    ],
)
def test_it_finds_what_predict_finds(
    exported: Path, detector: Detector, pictures: list[Path], tmp_path: Path, options: str, keywords: dict[str, Any]
) -> None:
    """To the digit that `predictions.json` has, with one batch size."""
    expected = rows(exported, tmp_path, pictures, f"--batch-size 2 {options}")
    found = detector(pictures, **keywords)
    assert [item.id for item in found] == [str(path) for path in pictures]
    for item, row in zip(found, expected, strict=True):
        assert made(item) == {name: row[name] for name in made(item)}
    assert any(item.objects or item.answer for item in found)


def test_a_checkpoint_and_its_export_find_the_same(
    trained_checkpoint: Path, detector: Detector, pictures: list[Path]
) -> None:
    assert Detector.from_pretrained(trained_checkpoint, batch_size=2)(pictures) == detector(pictures)


def test_one_image_gives_one_prediction_in_whatever_form_it_comes(detector: Detector, pictures: list[Path]) -> None:
    for path in (pictures[0], pictures[4]):
        expected = detector(str(path))
        assert isinstance(expected, Prediction) and (expected.width, expected.height) in ((90, 70), (64, 84))
        upright = Image.open(path)
        pixels = np.asarray(upright if path == pictures[0] else upright.transpose(Image.Transpose.ROTATE_270))
        for form in (path, path.read_bytes(), Image.open(path), pixels.copy()):
            assert made(detector(form)) == made(expected), type(form)
        assert isinstance(detector([path]), list)
    assert detector([]) == []


def test_a_bad_image_is_named(detector: Detector, pictures: list[Path], tmp_path: Path) -> None:
    good, bad = pictures[0], tmp_path / "bad.jpg"
    data = pictures[1].read_bytes()
    bad.write_bytes(data[: len(data) * 2 // 3])
    narrow: Any = np.zeros((2, 402, 3), np.uint8)
    bad_ones: list[tuple[Any, str]] = [
        (bad, rf"images\[3\] {bad}: cannot decode an image of .* bytes: image file is truncated"),
        (str(tmp_path / "none.png"), r"images\[3\] .*none.png: cannot read the file: No such file"),
        (b"text", r"images\[3\]: cannot decode an image of 4 bytes: no known image format"),
        (np.zeros((8, 8), np.uint8), r"images\[3\]: an array \(8, 8\) of uint8 is not \(height, width, 3\)"),
        (np.zeros((8, 8, 3)), r"images\[3\]: an array \(8, 8, 3\) of float64"),
        (narrow, r"images\[3\]: an image of 402 x 2 pixels is over 200 times as long as wide"),
        (np.zeros((0, 8, 3), np.uint8), r"images\[3\]: it has 8 x 0 pixels"),
        (Image.open(bad), r"images\[3\]: cannot decode it: image file is truncated"),
        (7, r"images\[3\]: int is not an image: give a path"),
    ]
    for image, said in bad_ones:
        with pytest.raises(ValueError, match=said):
            detector([good, good, good, image])
    assert detector(good).objects == detector([good, good, good])[2].objects


def test_senseless_arguments_are_refused(detector: Detector, pictures: list[Path]) -> None:
    asked: list[tuple[dict[str, Any], str]] = [
        ({"threshold": 1.5}, "score_threshold is 1.5: must be between 0 and 1"),
        ({"classes": "a,b"}, "classes is a text: give a list of texts"),
        ({"classes": ["a"]}, "1 classes leave no choice"),
        ({"prompt": "<|im_end|>"}, "control token"),
    ]
    for keywords, said in asked:
        with pytest.raises(ValueError, match=said):
            detector(pictures[0], **keywords)
    with pytest.raises(ValueError, match=r"device 'cuda:99' cannot be used .*: give cpu"):
        Detector.from_pretrained("./any", device="cuda:99")


def test_threads_get_what_one_gets(detector: Detector, pictures: list[Path]) -> None:
    """Each asks in another way, over and over, the language model too; the same numbers as one after the other."""
    ways: list[dict[str, Any]] = [{"answer": "both"}, {"classes": ["a star", "a circle"]}, {"prompt": "Where?"}]
    asked: list[Callable[[], Any]] = []
    for path in pictures:
        for keywords in ways:
            asked.append(lambda path=path, keywords=keywords: detector(path, **keywords))
    expected = [ask() for ask in asked]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda ask: ask(), asked * 2))
    assert found == expected * 2


def found_objects() -> Any:
    found = Detector.__call__.__globals__["Found"]
    objects = (
        DetectedObject((1.5, 2.0, 11.25, 4.0), 0.75, "a star"),
        DetectedObject((0.0, 0.0, 3.0, 3.0), 0.5, "a circle"),
    )
    return found("x", 20, 10, objects)


def test_coco_results() -> None:
    rows = found_objects().to_coco(7, {"A Star": 3, "square": 4})
    assert rows == [
        {"image_id": 7, "category_id": 3, "bbox": [1.5, 2.0, 9.75, 2.0], "score": 0.75, "caption": "a star"},
        {"image_id": 7, "category_id": -1, "bbox": [0.0, 0.0, 3.0, 3.0], "score": 0.5, "caption": "a circle"},
    ]
    assert [row["category_id"] for row in found_objects().to_coco("x.jpg")] == [1, 1]


def test_supervision_reads_it() -> None:
    supervision = pytest.importorskip("supervision")
    detections = found_objects().to_supervision()
    assert detections.xyxy.tolist() == [[1.5, 2.0, 11.25, 4.0], [0.0, 0.0, 3.0, 3.0]]
    assert detections.confidence.tolist() == [0.75, 0.5] and detections.class_id.tolist() == [1, 0]
    assert detections.data["class_name"].tolist() == ["a star", "a circle"]
    assert found_objects().to_supervision(["a star"]).class_id.tolist() == [0, -1]
    picture = np.zeros((10, 20, 3), np.uint8)
    assert supervision.BoxAnnotator().annotate(picture.copy(), detections).any()


def test_supervision_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[supervision\]'"):
        found_objects().to_supervision()


def test_an_unknown_name_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ.get("HF_HUB_OFFLINE") == "1", "make test sets it"
    for name in ("someone/some-model", "nothing-here"):
        with pytest.raises(
            ValueError, match=rf"'{name}' is neither a local folder nor a model .*HF_HUB_OFFLINE"
        ) as said:
            Detector.from_pretrained(name)
        assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match="does not exist"):
        Detector.from_pretrained("runs/none/checkpoints/latest-rank0.pt")
    with pytest.raises(AttributeError, match="module 'recipe' has no attribute 'Nothing'"):
        _ = sys.modules["recipe"].Nothing  # pyright: ignore[reportAttributeAccessIssue]
