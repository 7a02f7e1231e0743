"""`recipe/predict.py`: what is written is right, in pixels of the displayed image, and nothing is dropped."""

import json
import os
import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import recipe.inference.predictor
from convert.shapes import draw_scene
from convert.write import write_split
from recipe.checkpoints.weights import find_config
from recipe.data.collate import collate_standard, one_each
from recipe.export import main as export
from recipe.export import parse as parse_export
from recipe.inference.predictor import encode_image
from recipe.predict import main
from recipe.prediction.files import NO_CATEGORY, find_images, read_annotated_folder, read_entries
from recipe.prediction.options import parse
from recipe.prediction.tiles import merge_tiles
from recipe.schema import Example, Object, Pack, Prediction, Sample
from tests.launches.launch import run_composer
from tests.support.tiny_cases import load_model, make_encoder

HEADER = 34  # pixels above a drawing, which name the image


ROTATE_TO_SHOW = 6  # EXIF: the stored image is to be turned 90 degrees clockwise


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
    """The rows of predictions.json; checks that each usable image, and nothing else, is drawn."""
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
    model, _, config = load_model(trained_checkpoint)
    encoder = make_encoder(config, keep_image=True)
    example = encode_image(picture.read_bytes(), "scene", encoder)
    assert example.image_grid_thw.tolist() == [[1, 196 // 14, 308 // 14]]
    with torch.no_grad():
        outputs = model.eval()(collate_standard(one_each([example]), encoder.pad_token_id)).detection
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
    """The answer speaks of the resized image: its whole is the original's whole."""
    answer = '[{"bbox_2d": [0, 0, 308, 196], "label": "all"}, {"bbox_2d": [77, 98, 154, 196], "label": "part"}]'
    _, processor, _ = load_model(trained_checkpoint)
    ids = processor.tokenizer(answer, return_tensors="pt")["input_ids"][0]
    monkeypatch.setattr("recipe.prediction.decode.generate_answers", lambda *arguments: [ids])
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


def test_a_tile_is_predicted_as_an_image_of_its_own(
    trained_checkpoint: Path, scene: Image.Image, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wide = tmp_path / "wide.png"
    both = Image.new("RGB", (600, 200))
    both.paste(scene, (0, 0))
    both.paste(scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (300, 0))
    both.save(wide)
    merged: list[list[tuple[Any, Prediction]]] = []

    def record(whole: Prediction, found: Any, *options: float) -> Prediction:
        merged.append(found)
        return merge_tiles(whole, found, *options)

    monkeypatch.setattr("recipe.inference.predictor.merge_tiles", record)
    options = "--max-new-tokens 4 --tile 300 --overlap 0 --score-threshold 0.001"  # a head of two steps is not sure
    alone, rows = predict(trained_checkpoint, tmp_path / "out", picture, wide, options=options)
    assert [tile for tile, _ in merged[0]] == [(0, 0, 300, 200), (300, 0, 600, 200)]
    assert len(merged) == 1, "an image that is not larger than a tile has none"
    first = merged[0][0][1]
    assert first.answer is None and rows["answer"] is not None, "the answer is about the whole image"
    kept = [item for item in first.objects if item.score >= 0.001]
    for found, expected in zip(kept, alone["objects"], strict=True):
        assert found.box == pytest.approx(expected["box"], abs=0.02)
        assert found.caption == expected["caption"]
    assert all(item["caption"] for item in rows["objects"]), "every object above the threshold has one"
    assert max(item["box"][2] for item in rows["objects"]) > 300


def test_options_are_obeyed(trained_checkpoint: Path, picture: Path, tmp_path: Path):
    everything = predict(trained_checkpoint, tmp_path / "out", picture, options="--answer boxes")[0]
    assert everything["answer"] is None and everything["answer_objects"] is None
    assert everything["score_threshold"] == 0
    scores = [item["score"] for item in everything["objects"]]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True)
    middle = (scores[1] + scores[2]) / 2
    assert scores[2] < middle < scores[1]
    options = f"--answer boxes --overwrite --score-threshold {middle}"
    kept = predict(trained_checkpoint, tmp_path / "out", picture, options=options)[0]
    assert kept["objects"] == everything["objects"][:2]
    assert kept["score_threshold"] == pytest.approx(middle, rel=1e-5)
    below = [{**item, "caption": ""} for item in everything["objects"][2:] if item["score"] >= kept["least_score"]]
    assert kept["objects_below"] == below and everything["objects_below"] == []


def test_unusable_pictures_are_told_and_the_others_done(
    trained_checkpoint: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    missing, text, cut, strip = (tmp_path / name for name in ("missing.png", "text.png", "cut.png", "strip.png"))
    text.write_text("no picture")
    cut.write_bytes(picture.read_bytes()[:2000])
    Image.new("RGB", (900, 3)).save(strip)
    images = [missing, text, picture, cut, strip]
    rows = predict(trained_checkpoint, tmp_path / "out", *images, options="--answer boxes --batch-size 2")
    reasons = {
        missing: "cannot read the file: No such file",
        text: "no known image format",
        cut: "image file is truncated",
        strip: "over 200 times as long as wide",
    }
    printed = capsys.readouterr()
    for image, row in zip(images, rows, strict=True):
        if image is picture:
            assert row["error"] is None and len(row["objects"]) == 5
            continue
        assert reasons[image] in row["error"]
        assert row["objects"] is None and row["width"] is None and row["score_threshold"] is None
        assert f"failed: {image}: {row['error']}" in printed.err
    assert "1 images, 5 objects" in printed.out


def test_what_is_done_stays_when_it_is_stopped(
    trained_checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read = Path.read_bytes

    def interrupted(path: Path) -> bytes:
        if path.name == "never.png":
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(
            trained_checkpoint, tmp_path / "out", picture, Path("never.png"), options="--answer boxes --batch-size 1"
        )
    assert [entry.id for entry in read_entries(tmp_path / "out" / "predictions.json")] == ["scene"]
    with pytest.raises(KeyboardInterrupt):
        predict(trained_checkpoint, tmp_path / "none", Path("never.png"), options="--answer boxes")
    assert list((tmp_path / "none").iterdir()) == []  # nothing that the next run would have to overwrite


def test_a_file_name_that_is_not_utf_8(trained_checkpoint: Path, picture: Path, tmp_path: Path):
    odd = Path(os.fsdecode(bytes(tmp_path / "stra") + b"\xdfe.png"))
    odd.write_bytes(picture.read_bytes())
    (row,) = predict(trained_checkpoint, tmp_path / "out", odd, options="--answer boxes")
    assert Path(row["file"]).read_bytes() == picture.read_bytes()
    (tmp_path / "out" / "predictions.json").read_text(encoding="utf-8")


def test_full_memory_and_disk_name_the_remedy(
    trained_checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"scene.png: No space left on device: give"):
        patch.setattr(Image.Image, "save", full)
        predict(trained_checkpoint, tmp_path / "a", picture, options="--answer boxes")

    assert [row["error"] for row in json.loads((tmp_path / "a" / "predictions.json").read_text())] == [None]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot make the folder --out"):
        main(parse(["--checkpoint", "c", "--out", str(tmp_path / "file" / "out"), str(picture)]))


@pytest.mark.parametrize("num_too_large", [1, 3])
def test_a_batch_that_the_gpu_cannot_hold_is_halved(
    trained_checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_too_large: int
):
    pictures = [picture, *(picture.with_name(f"copy{number}.png") for number in range(2))]
    for path in pictures[1:]:
        path.write_bytes(picture.read_bytes())
    too_large = {path.stem for path in pictures[:num_too_large]}
    inner, sizes = recipe.inference.predictor.predict, []

    def limited(network: Any, batch: Any, decoding: Any) -> Any:
        sizes.append(len(batch["samples"]))
        if too_large & {sample.id for sample in batch["samples"]}:
            raise torch.OutOfMemoryError
        return inner(network, batch, decoding)

    monkeypatch.setattr("recipe.inference.predictor.predict", limited)
    rows = predict(trained_checkpoint, tmp_path / "out", *pictures, options="--answer boxes")
    assert sizes == ([3, 1, 2] if num_too_large == 1 else [3, 1, 2, 1, 1])
    reason = "it does not fit on the GPU: lower image.max_pixels in a --config"
    assert [row["error"] for row in rows] == [reason] * num_too_large + [None] * (3 - num_too_large)


def test_one_bad_picture_costs_no_other_one(trained_checkpoint: Path, picture: Path, tmp_path: Path):
    folder = tmp_path / "all"
    folder.mkdir()
    scene = Image.open(picture)
    entries = struct.pack("<HHIHHHHII", 0x112, 3, 1, ROTATE_TO_SHOW, 0, 0x128, 4, 1, 2**32 - 1)
    odd = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)  # a tag that Pillow cannot write
    scene.save(folder / "a.jpg", exif=odd)
    scene.save(folder / "b.avif")
    (folder / "c.avif").write_bytes((folder / "b.avif").read_bytes()[:-300])
    scene.resize((402, 2)).save(folder / "d.png")
    scene.save(folder / "e.tga")
    scene.save(folder / "f.png", "ICO")
    pictures = sorted(folder.iterdir())
    assert find_images([str(folder)], tmp_path / "out")[0] == pictures
    rows = predict(trained_checkpoint, tmp_path / "out", *pictures, options="--answer boxes --batch-size 6")
    assert [row["width"] for row in rows] == [200, 300, None, None, 300, None]
    for row, reason in ((rows[2], "cannot decode"), (rows[3], "200 times"), (rows[5], "no known image format")):
        assert reason in row["error"]


def test_a_cut_answer_is_told(
    trained_checkpoint: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    _, processor, _ = load_model(trained_checkpoint)
    ids = processor.tokenizer('[{"bbox_2d": [0, 0, 3', return_tensors="pt")["input_ids"][0]
    ended = torch.cat([ids, torch.tensor([processor.tokenizer.eos_token_id])])
    monkeypatch.setattr("recipe.prediction.decode.generate_answers", lambda *arguments: [ids, ended])
    other = picture.with_name("other.png")
    other.write_bytes(picture.read_bytes())
    rows = predict(trained_checkpoint, tmp_path / "out", picture, other)
    assert [row["answer_is_cut"] for row in rows] == [True, False]
    assert f"1 answers were cut off, such as of {picture}: raise --max-new-tokens" in capsys.readouterr().err


def test_drawings_can_be_left_out_and_files_that_are_none_are_told(
    trained_checkpoint: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "notes.txt").touch()
    options = ["--checkpoint", str(trained_checkpoint), "--out", str(tmp_path / "out"), "--answer", "boxes"]
    assert main(parse([*options, "--no-drawings", str(tmp_path)])) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.json", "coco_results.json"}
    assert "left out 1 files in folders that are not images (.txt 1)" in capsys.readouterr().err


def test_doubles_can_be_removed(trained_checkpoint: Path, picture: Path, tmp_path: Path):
    everything = predict(trained_checkpoint, tmp_path / "a", picture, options="--answer boxes")[0]["objects"]
    kept = predict(trained_checkpoint, tmp_path / "b", picture, options="--answer boxes --nms-iou 0.000001")[0][
        "objects"
    ]
    alone: list[dict[str, Any]] = []  # this random model may have none that overlap
    for item in everything:
        boxes = torch.tensor([other["box"] for other in [item, *alone]])
        if not alone or box_iou(boxes[:1], boxes[1:]).max() <= 0.000001:
            alone.append(item)
    assert kept == alone and kept


def test_an_input_is_not_drawn_over(trained_checkpoint: Path, picture: Path):
    before = picture.read_bytes()
    other = picture.with_name("other.png")
    other.write_bytes(before)
    options = "--answer boxes --overwrite"
    rows = predict(trained_checkpoint, picture.parent, picture, other, options=options)
    assert [row["id"] for row in rows] == ["scene-2", "other-2"]
    assert picture.read_bytes() == other.read_bytes() == before


def test_nothing_is_overwritten_unasked(trained_checkpoint: Path, picture: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["--checkpoint", str(trained_checkpoint), "--out", str(out), "--answer", "boxes", str(picture)]
    for name in ("scene.png", "predictions.json", "coco_results.json"):
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match=f"already holds {name}: give another --out, or --overwrite"):
            main(parse(arguments))
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    assert main(parse(arguments)) == 0
    with pytest.raises(ValueError, match=r"predictions.json, coco_results.json, scene.png"):
        main(parse(arguments))


def test_coco_results(trained_checkpoint: Path, scene: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for folder, size in (("a", (60, 60)), ("b", (90, 60))):
        (tmp_path / folder).mkdir()
        scene.resize(size).save(tmp_path / folder / "x.png")
    instances = tmp_path / "instances.json"
    images = [{"id": 70, "file_name": "b/x.png"}, {"id": 80, "file_name": "a/x.png"}]
    instances.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"]
    rows = predict(trained_checkpoint, tmp_path / "out", *paths, options=f"--answer boxes --image-ids {instances}")
    assert [row["image_id"] for row in rows] == [80, 70]
    assert "class-agnostic: every category_id is 1" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    assert [item["image_id"] for item in results] == [80] * 5 + [70] * 5
    for item, found in zip(results, rows[0]["objects"] + rows[1]["objects"], strict=True):
        x1, y1, x2, y2 = found["box"]
        assert item["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.01)
        assert (item["category_id"], item["score"], item["caption"]) == (1, found["score"], found["caption"])
    twice = tmp_path / "elsewhere" / "b"
    twice.mkdir(parents=True)
    scene.save(twice / "x.png")
    arguments = ["--checkpoint", "c", "--out", str(tmp_path / "o"), "--image-ids", str(instances)]
    with pytest.raises(
        ValueError, match=r"b/x.png and .*elsewhere/b/x.png can both be b/x.png of the data set: predict"
    ):
        main(parse([*arguments, str(tmp_path / "b" / "x.png"), str(twice / "x.png")]))
    with pytest.raises(ValueError, match=r"scene.png is not among the images of --image-ids .*instances.json: leave"):
        main(parse(["--checkpoint", "c", "--out", str(tmp_path / "o"), "--image-ids", str(instances), "scene.png"]))


def test_the_truth_is_drawn_beside(
    trained_checkpoint: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Of images of its size alone; its ids are those of the results."""
    other = picture.with_name("other.png")
    Image.open(picture).resize((60, 40)).save(other)
    box = {"image_id": 31, "category_id": 2, "bbox": [10, 20, 30, 40]}
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    images = [
        {"id": n, "file_name": name, "width": 300, "height": 200}
        for n, name in enumerate(("scene.png", "other.png"), 31)
    ]
    truth = tmp_path / "instances.json"
    truth.write_text(json.dumps({"images": images, "annotations": [box], "categories": categories}))
    drawn: list[Sample] = []

    def recorded(image: Image.Image, prediction: Prediction, truth: Sample, *_: object) -> Image.Image:
        drawn.append(truth)
        return image

    monkeypatch.setattr("recipe.predict.draw_prediction", recorded)
    rows = predict(trained_checkpoint, tmp_path / "out", picture, other, options=f"--answer boxes --truth {truth}")
    assert [sample.objects for sample in drawn] == [(Object((10, 20, 40, 60), "cat"),)]
    assert rows[0]["error"] is None
    results = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    assert {(item["image_id"], item["category_id"]) for item in results} == {(31, NO_CATEGORY)}
    assert f"{len(results)} of {len(results)} boxes have category_id -1" in capsys.readouterr().out
    assert "it has 60 x 40 pixels, its truth 300 x 200" in rows[1]["error"]
    with pytest.raises(ValueError, match=r"gone.png is not among the images of --truth"):
        main(parse(["--checkpoint", "c", "--out", str(tmp_path / "o"), "--truth", str(truth), "gone.png"]))


def test_only_the_text_is_asked(
    trained_checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, processor, _ = load_model(trained_checkpoint)
    answer = '[{"bbox_2d": [0, 0, 308, 196], "label": "all"}]'
    ids = processor.tokenizer(answer, return_tensors="pt")["input_ids"][0]
    monkeypatch.setattr("recipe.prediction.decode.generate_answers", lambda *arguments: [ids])
    monkeypatch.delattr("recipe.prediction.decode.generate_captions")
    row = predict(trained_checkpoint, tmp_path / "out", picture, options="--answer text")[0]
    assert row["objects"] is None and row["score_threshold"] is None
    assert row["answer_objects"] == [{"box": [0, 0, 300, 200], "caption": "all"}]
    (result,) = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    assert result == {"image_id": 1, "category_id": 1, "bbox": [0, 0, 300, 200], "score": 1.0, "caption": "all"}


@pytest.fixture
def teachers(tmp_path: Path, scene: Image.Image) -> Path:
    """Two annotated images as JSON lines; the second is the image of `picture`."""
    folder = tmp_path / "teachers"
    folder.mkdir()
    lines = []
    for name, image in (("one.png", scene.resize((60, 40))), ("two.png", scene)):
        image.save(folder / name)
        lines.append({"id": name, "images": [name], "objects": [{"bbox_2d": [1, 2, 30, 40], "desc": f"of {name}"}]})
    (folder / "pool.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


@pytest.mark.parametrize(("options", "num_shown"), [("", [2, 1]), ("--num-teachers 1", [1, 1])])
def test_teachers_are_shown_before_each_picture(
    options: str,
    num_shown: list[int],
    teachers: Path,
    trained_checkpoint: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    shown: list[Example] = []

    def recorded(packs: Sequence[Pack], pad: int) -> Any:
        shown.extend(example for pack in packs for example in pack.examples)
        return collate_standard(packs, pad)

    monkeypatch.setattr("recipe.inference.predictor.collate_standard", recorded)
    other = tmp_path / "other.png"
    Image.open(picture).crop((0, 0, 84, 84)).save(other)
    options = f"--answer boxes --teachers {teachers} {options}"
    rows = predict(trained_checkpoint, tmp_path / "out", other, picture, options=options)
    assert [row["error"] for row in rows] == [None, None]
    assert [len(example.image_grid_thw) - 1 for example in shown] == num_shown  # an image is not its own teacher
    encoder = make_encoder(find_config(trained_checkpoint))
    taught = read_annotated_folder(teachers)
    sample = Sample("x", other.read_bytes(), 84, 84, None)
    assert shown[0].input_ids.equal(encoder(sample, taught[: num_shown[0]]).input_ids)
    alone = predict(trained_checkpoint, tmp_path / "alone", other, options="--answer boxes")[0]
    assert alone["objects"] != rows[0]["objects"]
    drawn = [Image.open(tmp_path / folder / "other.png").width for folder in ("out", "alone")]
    assert drawn[0] > drawn[1]


def test_teachers_of_shards_and_unusable_ones(teachers: Path, tmp_path: Path):
    found = read_annotated_folder(teachers)
    assert [(item.id, item.objects) for item in found] == [
        (name, (Object((1, 2, 30, 40), f"of {name}"),)) for name in ("one.png", "two.png")
    ]
    write_split(found, str(tmp_path / "shards"), "pool")
    assert read_annotated_folder(tmp_path / "shards" / "pool") == found
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("empty", "neither index.json nor one file"),
        ("shards", "give one of its splits, such as .*shards/pool"),
        ("gone", "gone is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            read_annotated_folder(tmp_path / folder)
    (teachers / "rejected.jsonl").write_text("{}")  # of a conversion: no annotations
    assert read_annotated_folder(teachers) == found
    pool = teachers / "pool.jsonl"
    pool.write_text(json.dumps({"id": "a", "images": ["one.png"]}))
    with pytest.raises(ValueError, match=r"not one annotated image: ..a"):
        read_annotated_folder(teachers)
    pool.write_text(json.dumps({"id": "a", "images": ["gone.png"], "objects": []}))
    with pytest.raises(ValueError, match=r"pool.jsonl: line 1: missing file"):
        read_annotated_folder(teachers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [(None, "failed: no.png: cannot read the file"), ("no.pt", "error: checkpoint no.pt does not exist")],
)
def test_exit_status(checkpoint: str | None, message: str, trained_checkpoint: Path, picture: Path):
    arguments = ("--checkpoint", checkpoint or str(trained_checkpoint), "--out", str(picture.parent / "out"))
    arguments += ("--answer", "boxes", str(picture), "no.png")
    done = run_composer(0, "recipe/predict.py", *arguments, check=False)
    assert done.returncode == 1
    assert message in done.output
    assert (picture.parent / "out" / "scene.png").is_file() == (checkpoint is None)
