"""What W&B is given of the predictions: boxes over images and a table, offline, read back from the run's folder."""

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from PIL import Image
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from recipe.callbacks.samples import LogPredictions, layers_of, table_rows, wandb_images, write
from recipe.callbacks.table import build_loggers
from recipe.schema import DetectedObject, FurtherImage, Prediction
from tests.callbacks.test_table import make_sample, train

FOUND = (DetectedObject((2.0, 2.0, 20.0, 20.0), 0.9, "red circle"), DetectedObject((0.0, 0.0, 48.0, 32.0), 0.2, ""))
ANSWERED = (DetectedObject((24.0, 16.0, 48.0, 32.0), 1.0, "blue star"),)


def history(folder: Path) -> list[dict[str, Any]]:
    """All that was logged, from the run's own file."""
    wandb.teardown()  # a finished run's file is still written to by wandb's process, for a moment
    (path,) = folder.glob("wandb/latest-run/*.wandb")
    store, rows = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {"/".join(item.nested_key): json.loads(item.value_json) for item in items}
                | {"step": record.history.step.num}
            )
    return rows


def test_wandb_gets_boxes_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train([LogPredictions(3, tmp_path / "pictures", 0.3)], build_loggers({"wandb": {}}, str(tmp_path)))
    rows = [row for row in history(tmp_path) if "predictions_boxes/captions" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    row, files = rows[1], tmp_path / "wandb" / "latest-run" / "files"
    assert row["predictions_boxes/captions"] == ["a/b", "c", "d"]
    assert [Image.open(files / name).size for name in row["predictions_boxes/filenames"]] == [(48, 32)] * 3
    boxes = {
        whose: json.loads((files / layer["path"]).read_text())["box_data"]
        for whose, layer in row["predictions_boxes/all_boxes"][0].items()
    }
    assert boxes.keys() == {"prediction", "truth"}
    (found,), (wanted,) = boxes["prediction"], boxes["truth"]
    assert found["position"] == pytest.approx({"minX": 2 / 48, "maxX": 20 / 48, "minY": 2 / 32, "maxY": 20 / 32})
    assert wanted["position"] == pytest.approx({"minX": 3 / 48, "maxX": 20 / 48, "minY": 3 / 32, "maxY": 20 / 32})
    assert found["class_id"] == wanted["class_id"]  # the same words
    assert (found["box_caption"], found["scores"]) == ("red circle 0.90", {"score": 0.9})
    assert "scores" not in wanted
    table = json.loads((files / row["predictions_table/path"]).read_text())
    assert table["columns"][:4] == ["image", "whose", "score", "caption"]
    assert table["data"][:2] == [
        ["a/b", "prediction", 0.9, "red circle", 2.0, 2.0, 20.0, 20.0],
        ["a/b", "truth", None, "red circle", 3.0, 3.0, 20.0, 20.0],
    ]


def test_a_chat_whose_pictures_are_not_annotated_is_not_drawn(tmp_path: Path) -> None:
    sample = replace(make_sample("a"), objects=None, further=(FurtherImage(b"", 4, 4, None),))
    samples = [sample, make_sample("b")]
    outputs = SimpleNamespace(samples=samples, predictions=[Prediction("a", 48, 32, ())] * 2)
    now = SimpleNamespace(batch=SimpleNamespace(value=1))
    state: Any = SimpleNamespace(batch={"samples": samples}, outputs=outputs, timestamp=now)
    callback = LogPredictions(2, tmp_path, 0.3)
    callback.eval_before_forward(state, state)
    callback.eval_after_forward(state, state)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["00_b.png"]


def test_layers() -> None:
    sample = make_sample("a")
    prediction = Prediction("a", 48, 32, FOUND, "[...]", ANSWERED)
    layers = layers_of(sample, prediction, 0.3)
    assert layers == {"prediction": [FOUND[0]], "text_answer": ANSWERED, "truth": sample.objects}
    assert set(layers_of(make_sample("a", has_image=False), Prediction("a", 48, 32, FOUND), 0.3)) == {"prediction"}
    rows = table_rows([(sample, prediction)], 0.0)
    assert [row[1:4] for row in rows] == [
        ["prediction", 0.9, "red circle"],
        ["prediction", 0.2, ""],
        ["text_answer", None, "blue star"],
        ["truth", None, "red circle"],
    ]


def test_pictures_of_other_sizes_get_a_margin() -> None:
    small, large = make_sample("a"), make_sample("b")
    data = BytesIO()
    Image.new("RGB", (96, 128), "white").save(data, format="PNG")
    large = replace(large, image=data.getvalue(), width=96, height=128, objects=())
    images = wandb_images([(small, Prediction("a", 48, 32, FOUND)), (large, Prediction("b", 96, 128, ()))], 0.3)
    assert [Image.open(image._path).size for image in images] == [(96, 128)] * 2  # pyright: ignore[reportArgumentType]
    boxes: Any = images[0]._boxes
    position = boxes["prediction"]._val[0]["position"]
    assert position == pytest.approx({"minX": 2 / 96, "maxX": 20 / 96, "minY": 2 / 128, "maxY": 20 / 128})
    assert not images[1]._boxes


def test_a_full_disk_ends_no_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save = Image.Image.save

    def full(image: Image.Image, target: Any, *arguments: Any, **keywords: Any) -> None:
        if isinstance(target, Path):  # else samples are made
            raise OSError(28, "No space left on device")
        save(image, target, *arguments, **keywords)

    monkeypatch.setattr(Image.Image, "save", full)
    train([LogPredictions(3, tmp_path / "pictures", 0.3)], [])
    assert caplog.text.count("No space left on device; training continues: free disk space") == 4 * (3 + 1)
    (tmp_path / "file").touch()
    assert not write(tmp_path / "file" / "below", Path.touch), "its folder cannot be made"
    assert write(tmp_path / "folder" / "file", Path.touch)
