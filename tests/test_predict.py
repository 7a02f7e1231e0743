"""`recipe/predict.py`: what is written is right, in pixels of the displayed picture, and nothing is dropped."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from convert.shapes import draw_scene
from recipe.build import build_encoder
from recipe.checkpoint import load_model
from recipe.data.collate import collate_standard
from recipe.export import main as export
from recipe.export import parse as parse_export
from recipe.predict import encode_picture, main, parse, unique_names
from tests.launch import REPOSITORY

HEADER = 34  # pixels above a drawing, which name the picture
ROTATE_TO_SHOW = 6  # EXIF: the stored picture is to be turned 90 degrees clockwise


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    """300 x 200 pixels, which the model sees as 308 x 196."""
    return Image.open(BytesIO(draw_scene(seed=4, index=1, image_size=300, min_objects=3).image)).crop((0, 0, 300, 200))


@pytest.fixture
def picture(scene: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    scene.save(path)
    return path


def predict(checkpoint: Path, out: Path, *images: Path, options: str = "--max-new-tokens 4") -> list[dict[str, Any]]:
    """The rows of predictions.json; checks that each usable picture, and nothing else, is drawn."""
    arguments = ["--checkpoint", str(checkpoint), "--out", str(out), *options.split(), *map(str, images)]
    num_failed = main(parse(arguments))
    rows = json.loads((out / "predictions.json").read_text())
    assert [row["file"] for row in rows] == [str(image) for image in images]
    assert sum(row["error"] is not None for row in rows) == num_failed
    for row in rows:
        assert (out / f"{row['id']}.png").is_file() == (row["error"] is None)
    return rows


def test_boxes_are_in_pixels_of_the_original(trained_checkpoint: Path, picture: Path, tmp_path: Path):
    row = predict(trained_checkpoint, tmp_path / "out", picture)[0]
    assert (row["id"], row["width"], row["height"]) == ("scene", 300, 200)
    model, processor, config = load_model(trained_checkpoint)
    encoder = build_encoder(config, processor, keep_image=True)
    example = encode_picture(picture, "scene", encoder)
    assert example.image_grid_thw.tolist() == [[1, 196 // 14, 308 // 14]]
    with torch.no_grad():
        outputs = model.eval()(collate_standard([example], encoder.pad_token_id)).detection
    scores, order = outputs.pred_objectness[0].sigmoid().sort(descending=True)
    assert [item["score"] for item in row["objects"]] == pytest.approx(scores.tolist(), abs=1e-4)
    for item, (x, y, width, height) in zip(row["objects"], outputs.pred_boxes[0][order].tolist(), strict=True):
        corners = ((x - width / 2) * 300, (y - height / 2) * 200, (x + width / 2) * 300, (y + height / 2) * 200)
        inside = [min(max(value, 0), limit) for value, limit in zip(corners, (300, 200, 300, 200), strict=True)]
        assert item["box"] == pytest.approx(inside, abs=0.01)
        assert set(item) == {"box", "score", "caption"}


def test_answer_is_read_back_in_pixels_of_the_original(
    trained_checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The answer speaks of the resized picture: its whole is the original's whole."""
    answer = '[{"bbox_2d": [0, 0, 308, 196], "label": "all"}, {"bbox_2d": [77, 98, 154, 196], "label": "part"}]'
    _, processor, _ = load_model(trained_checkpoint)
    ids = processor.tokenizer(answer, return_tensors="pt")["input_ids"][0]
    monkeypatch.setattr("recipe.inference.generate_answers", lambda *arguments: [ids])
    row = predict(trained_checkpoint, tmp_path / "out", picture)[0]
    assert row["answer"] == answer
    assert row["answer_objects"] == [
        {"box": [0, 0, 300, 200], "caption": "all"},
        {"box": [75, 100, 150, 200], "caption": "part"},
    ]


def test_turned_picture_is_predicted_as_it_is_displayed(
    trained_checkpoint: Path, scene: Image.Image, picture: Path, tmp_path: Path
):
    turned = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x112] = ROTATE_TO_SHOW
    scene.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    assert Image.open(turned).size == (200, 300)
    upright, rotated = predict(trained_checkpoint, tmp_path / "out", picture, turned, options="--batch-size 1")
    for key in ("width", "height", "objects", "answer", "answer_objects"):
        assert rotated[key] == upright[key], key
    drawn = [Image.open(tmp_path / "out" / f"{name}.png") for name in ("scene", "turned")]
    below_title = [image.crop((0, HEADER, *image.size)).tobytes() for image in drawn]
    assert below_title[0] == below_title[1]


def test_export_predicts_the_same(trained_checkpoint: Path, picture: Path, tmp_path: Path):
    other = tmp_path / "other.jpg"
    Image.open(picture).resize((90, 130)).save(other)
    export(parse_export(["--checkpoint", str(trained_checkpoint), "--out", str(tmp_path / "model")]))
    rows = predict(trained_checkpoint, tmp_path / "a", picture, other)
    assert len(rows[0]["objects"]) > 0
    predict(tmp_path / "model", tmp_path / "b", picture, other)
    files = [(tmp_path / folder / "predictions.json").read_bytes() for folder in "ab"]
    assert files[0] == files[1]


def test_batches_change_nothing(trained_checkpoint: Path, scene: Image.Image, tmp_path: Path):
    paths = []
    for size in ((300, 200), (60, 60), (140, 224)):
        paths.append(tmp_path / f"{size[0]}.png")
        scene.resize(size).save(paths[-1])
    alone = predict(trained_checkpoint, tmp_path / "a", *paths, options="--max-new-tokens 4 --batch-size 1")
    together = predict(trained_checkpoint, tmp_path / "b", *paths, options="--max-new-tokens 4 --batch-size 3")
    for one, other in zip(alone, together, strict=True):
        assert one["answer"] == other["answer"]
        for found, expected in zip(other["objects"], one["objects"], strict=True):
            assert found["box"] == pytest.approx(expected["box"], abs=0.02)
            assert found["score"] == pytest.approx(expected["score"], abs=2e-4)
            assert found["caption"] == expected["caption"]


def test_options_are_obeyed(trained_checkpoint: Path, picture: Path, tmp_path: Path):
    everything = predict(trained_checkpoint, tmp_path / "out", picture, options="--no-answer")[0]
    assert everything["answer"] is None and everything["answer_objects"] is None
    scores = [item["score"] for item in everything["objects"]]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True)
    middle = (scores[1] + scores[2]) / 2
    assert scores[2] < middle < scores[1]
    options = f"--no-answer --score-threshold {middle}"
    kept = predict(trained_checkpoint, tmp_path / "out", picture, options=options)[0]
    assert kept["objects"] == everything["objects"][:2]


def test_unusable_pictures_are_told_and_the_others_done(
    trained_checkpoint: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    missing, text, cut, strip = (tmp_path / name for name in ("missing.png", "text.png", "cut.png", "strip.png"))
    text.write_text("no picture")
    cut.write_bytes(picture.read_bytes()[:2000])
    Image.new("RGB", (900, 3)).save(strip)
    images = [missing, text, picture, cut, strip, tmp_path]
    rows = predict(trained_checkpoint, tmp_path / "out", *images, options="--no-answer --batch-size 2")
    reasons = {
        missing: "cannot read the file: No such file",
        text: "no known picture format",
        cut: "image file is truncated",
        strip: "over 200 times as long as wide",
        tmp_path: "cannot read the file: Is a directory",
    }
    printed = capsys.readouterr()
    for image, row in zip(images, rows, strict=True):
        if image is picture:
            assert row["error"] is None and len(row["objects"]) == 5
            continue
        assert reasons[image] in row["error"]
        assert row["objects"] is None and row["width"] is None
        assert f"failed: {image}: {row['error']}" in printed.err
    assert "1 pictures, 5 objects" in printed.out


def test_names_are_kept_apart(tmp_path: Path):
    paths = [tmp_path / name for name in ("a/x.png", "b/x.jpg", "b/X.png", "c/x-2.png", "d/x.tar.png")]
    assert unique_names(paths, tmp_path / "out") == ["x", "x-2", "X-3", "x-2-2", "x.tar"]


def test_an_input_is_not_drawn_over(trained_checkpoint: Path, picture: Path):
    before = picture.read_bytes()
    rows = predict(trained_checkpoint, picture.parent, picture, picture, options="--no-answer")
    assert [row["id"] for row in rows] == ["scene-2", "scene-3"]
    assert picture.read_bytes() == before


@pytest.mark.parametrize(
    "option", ["--score-threshold 1.5", "--score-threshold nan", "--batch-size 0", "--max-new-tokens 0"]
)
def test_senseless_options_are_refused(option: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(["--checkpoint", "c", "--out", "o", "image.png", *option.split()])
    assert f"{option}: must be" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [(None, "failed: no.png: cannot read the file"), ("no.pt", "error: checkpoint no.pt does not exist")],
)
def test_exit_status(checkpoint: str | None, message: str, trained_checkpoint: Path, picture: Path):
    command = [sys.executable, "recipe/predict.py", "--checkpoint", checkpoint or str(trained_checkpoint)]
    command += ["--out", str(picture.parent / "out"), "--no-answer", str(picture), "no.png"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert message in done.stderr
    assert (picture.parent / "out" / "scene.png").is_file() == (checkpoint is None)
