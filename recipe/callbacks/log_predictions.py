"""Draw predicted and true boxes with their captions at every evaluation."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from composer import Callback
from composer.core import State
from composer.loggers import Logger, WandBLogger
from composer.utils import dist
from PIL import Image

from recipe.images import open_image
from recipe.prediction.draw import draw_gallery, draw_prediction
from recipe.schema import DetectedObject, Object, Prediction, Sample

OVERLAY_SIZE = 1024  # longest side in pixels of an image that W&B draws boxes on
TABLE_COLUMNS = ["image", "whose", "score", "caption", "x1", "y1", "x2", "y2"]


class LogPredictions(Callback):
    """Draws the first images of every evaluation on rank 0; touches no random state and no tensor of the model.

    Writes `FOLDER/{batch:06d}/{number}_{sample id}.png` and `gallery.png`, and logs the gallery to every logger that
    takes images. Logs a table of the boxes to every logger that takes tables. Logs the images to W&B with their boxes
    as overlays, which its page shows and hides by class and score.

    Args:
        num_images: Drawn per evaluation: those of the first samples that have an image.
        folder: Gets the drawings.
        score_threshold: Objects below it are neither drawn nor logged.
    """

    def __init__(self, num_images: int, folder: str | Path, score_threshold: float):
        self.num_images = num_images
        self.folder = Path(folder)
        self.score_threshold = score_threshold
        self._shown: list[tuple[Sample, Prediction]] = []

    def eval_start(self, state: State, logger: Logger) -> None:
        """Forget the previous evaluation."""
        self._shown = []

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Draw this microbatch's images until there are enough."""
        if dist.get_global_rank() != 0 or len(self._shown) >= self.num_images:
            return
        outputs: Any = state.outputs  # recipe.joint's evaluation outputs
        for sample, prediction in zip(state.batch["samples"], outputs.predictions, strict=True):
            if sample.image and len(self._shown) < self.num_images:
                drawing = draw_prediction(open_image(sample.image), prediction, sample, self.score_threshold)
                file_name = re.sub(r"[^\w.-]+", "_", sample.id)[-80:]
                self._save(drawing, f"{len(self._shown):02d}_{file_name}.png", state)
                self._shown.append((sample, prediction))

    def eval_end(self, state: State, logger: Logger) -> None:
        """Save and log the gallery, and log table and overlays."""
        if not self._shown:
            return
        gallery = draw_gallery(self._shown, self.score_threshold)
        self._save(gallery, "gallery.png", state)
        logger.log_images(np.asarray(gallery), name="predictions", channels_last=True, use_table=False)
        logger.log_table(TABLE_COLUMNS, table_rows(self._shown, self.score_threshold), name="predictions_table")
        for destination in logger.destinations:
            if isinstance(destination, WandBLogger) and wandb.run is not None:
                # Through the logger's own method: a guarded logger does not end the run if it fails.
                images = wandb_images(self._shown, self.score_threshold)
                destination.log_metrics({"predictions_boxes": images}, step=state.timestamp.batch.value)
        self._shown = []

    def _save(self, drawing: Image.Image, name: str, state: State) -> None:
        folder = self.folder / f"{state.timestamp.batch.value:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        drawing.save(folder / name)


def layers_of(
    sample: Sample, prediction: Prediction, score_threshold: float
) -> dict[str, Sequence[DetectedObject | Object]]:
    """Return the objects of an image by whose they are; `text_answer` and `truth` only if they exist."""
    layers: dict[str, Sequence[DetectedObject | Object]] = {
        "prediction": [item for item in prediction.objects if item.score >= score_threshold]
    }
    if prediction.answer_objects is not None:
        layers["text_answer"] = prediction.answer_objects
    if sample.objects is not None:
        layers["truth"] = sample.objects
    return layers


def table_rows(shown: Iterable[tuple[Sample, Prediction]], score_threshold: float) -> list[list[Any]]:
    """Return one row of `TABLE_COLUMNS` per box, in pixels of the displayed image; only the head gives scores."""
    return [
        [sample.id, whose, _score(item, whose), item.caption, *(round(float(value), 1) for value in item.box)]
        for sample, prediction in shown
        for whose, items in layers_of(sample, prediction, score_threshold).items()
        for item in items
    ]


def wandb_images(shown: Sequence[tuple[Sample, Prediction]], score_threshold: float) -> list[wandb.Image]:
    """Return the images with their boxes as W&B overlays; a caption is a class, the same in all images.

    W&B displays the images of a step correctly only if they have one size, so smaller ones get a margin.
    """
    layers = [layers_of(sample, prediction, score_threshold) for sample, prediction in shown]
    captions = sorted({item.caption for layer in layers for items in layer.values() for item in items})
    classes = {caption: number for number, caption in enumerate(captions)}
    class_labels = {number: caption or "(no caption)" for caption, number in classes.items()}
    images = [open_image(sample.image) for sample, _ in shown]
    for image in images:
        image.thumbnail((OVERLAY_SIZE, OVERLAY_SIZE), Image.Resampling.LANCZOS)
    size = max(image.width for image in images), max(image.height for image in images)
    logged = []
    for (sample, _), layer, image in zip(shown, layers, images, strict=True):
        canvas = Image.new("RGB", size)
        canvas.paste(image, (0, 0))
        scale = image.width / sample.width / size[0], image.height / sample.height / size[1]
        boxes = {
            whose: {
                "box_data": [_box_data(item, whose, classes, scale) for item in items],
                "class_labels": class_labels,
            }
            for whose, items in layer.items()
            if items
        }
        logged.append(wandb.Image(canvas, boxes=boxes or None, caption=sample.id))
    return logged


def _box_data(
    item: DetectedObject | Object, whose: str, classes: dict[str, int], scale: tuple[float, float]
) -> dict[str, Any]:
    """Return a box in W&B's form, as shares of the canvas: pixels of the displayed image times `scale`."""
    x1, y1, x2, y2 = item.box
    position = {"minX": x1 * scale[0], "maxX": x2 * scale[0], "minY": y1 * scale[1], "maxY": y2 * scale[1]}
    data: dict[str, Any] = {"position": position, "class_id": classes[item.caption], "box_caption": item.caption}
    score = _score(item, whose)
    if score is not None:
        data["box_caption"] = f"{item.caption} {score:.2f}"
        data["scores"] = {"score": score}
    return data


def _score(item: DetectedObject | Object, whose: str) -> float | None:
    """Return the score; None for truths and for a text answer's boxes, which have none."""
    return float(item.score) if whose == "prediction" and isinstance(item, DetectedObject) else None
