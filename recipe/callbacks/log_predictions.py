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

OVERLAY_SIZE = 1024  # longest side in pixels of a picture that W&B lays boxes over
TABLE_COLUMNS = ["picture", "whose", "score", "caption", "x1", "y1", "x2", "y2"]


class LogPredictions(Callback):
    """Draws the first pictures of every evaluation on rank 0; touches no random state and no tensor of the model.

    Writes `FOLDER/{batch:06d}/{number}_{sample id}.png` and `gallery.png`, and logs the gallery to every logger that
    takes images. Logs a table of the boxes to every logger that takes tables, and to W&B the pictures with boxes laid
    over them, which its page shows and hides by class and score.

    Args:
        num_images: Pictures to draw; those of the first evaluation samples that have one.
        folder: Of the pictures.
        score_threshold: Objects below it are neither drawn nor logged.
    """

    def __init__(self, num_images: int, folder: str | Path, score_threshold: float):
        self.num_images = num_images
        self.folder = Path(folder)
        self.score_threshold = score_threshold
        self._shown: list[tuple[Sample, Prediction]] = []

    def eval_start(self, state: State, logger: Logger) -> None:
        """Forgets the evaluation before."""
        self._shown = []

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Draws this microbatch's pictures until there are enough."""
        if dist.get_global_rank() != 0 or len(self._shown) >= self.num_images:
            return
        outputs: Any = state.outputs  # recipe.joint's evaluation outputs
        for sample, prediction in zip(state.batch["samples"], outputs.predictions, strict=True):
            if sample.image and len(self._shown) < self.num_images:
                picture = draw_prediction(open_image(sample.image), prediction, sample, self.score_threshold)
                self._save(picture, f"{len(self._shown):02d}_{_file_name(sample.id)}.png", state)
                self._shown.append((sample, prediction))

    def eval_end(self, state: State, logger: Logger) -> None:
        """Saves and logs the gallery, and logs table and overlays."""
        if not self._shown:
            return
        gallery = draw_gallery(self._shown, self.score_threshold)
        self._save(gallery, "gallery.png", state)
        logger.log_images(np.asarray(gallery), name="predictions", channels_last=True, use_table=False)
        logger.log_table(TABLE_COLUMNS, table_rows(self._shown, self.score_threshold), name="predictions_table")
        for destination in logger.destinations:
            if isinstance(destination, WandBLogger) and wandb.run is not None:
                # Through the logger's own method, which a guarded logger lets fail without ending the run.
                images = wandb_images(self._shown, self.score_threshold)
                destination.log_metrics({"predictions_boxes": images}, step=state.timestamp.batch.value)
        self._shown = []

    def _save(self, picture: Image.Image, name: str, state: State) -> None:
        folder = self.folder / f"{state.timestamp.batch.value:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)


def layers_of(
    sample: Sample, prediction: Prediction, score_threshold: float
) -> dict[str, Sequence[DetectedObject | Object]]:
    """The objects of a picture by whose they are; `text_answer` and `truth` only where there are such."""
    layers: dict[str, Sequence[DetectedObject | Object]] = {
        "prediction": [item for item in prediction.objects if item.score >= score_threshold]
    }
    if prediction.answer_objects is not None:
        layers["text_answer"] = prediction.answer_objects
    if sample.objects is not None:
        layers["truth"] = sample.objects
    return layers


def table_rows(shown: Iterable[tuple[Sample, Prediction]], score_threshold: float) -> list[list[Any]]:
    """One row of `TABLE_COLUMNS` a box, in pixels of the displayed picture; the head alone gives scores."""
    return [
        [sample.id, whose, _score(item, whose), item.caption, *(round(float(value), 1) for value in item.box)]
        for sample, prediction in shown
        for whose, items in layers_of(sample, prediction, score_threshold).items()
        for item in items
    ]


def wandb_images(shown: Sequence[tuple[Sample, Prediction]], score_threshold: float) -> list[wandb.Image]:
    """The pictures, each with its boxes in layers that W&B lays over it; a caption is a class, the same in all.

    W&B shows pictures of one step rightly only if they are of one size, so smaller ones get a margin.
    """
    layers = [layers_of(sample, prediction, score_threshold) for sample, prediction in shown]
    captions = sorted({item.caption for layer in layers for items in layer.values() for item in items})
    classes = {caption: number for number, caption in enumerate(captions)}
    class_labels = {number: caption or "(no caption)" for caption, number in classes.items()}
    pictures = [open_image(sample.image) for sample, _ in shown]
    for picture in pictures:
        picture.thumbnail((OVERLAY_SIZE, OVERLAY_SIZE), Image.Resampling.LANCZOS)
    size = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    images = []
    for (sample, _), layer, picture in zip(shown, layers, pictures, strict=True):
        canvas = Image.new("RGB", size)
        canvas.paste(picture, (0, 0))
        scale = picture.width / sample.width / size[0], picture.height / sample.height / size[1]
        boxes = {
            whose: {
                "box_data": [_box_data(item, whose, classes, scale) for item in items],
                "class_labels": class_labels,
            }
            for whose, items in layer.items()
            if items
        }
        images.append(wandb.Image(canvas, boxes=boxes or None, caption=sample.id))
    return images


def _box_data(
    item: DetectedObject | Object, whose: str, classes: dict[str, int], scale: tuple[float, float]
) -> dict[str, Any]:
    """A box in W&B's form, in shares of its canvas: pixels of the displayed picture times `scale`."""
    x1, y1, x2, y2 = item.box
    position = {"minX": x1 * scale[0], "maxX": x2 * scale[0], "minY": y1 * scale[1], "maxY": y2 * scale[1]}
    data: dict[str, Any] = {"position": position, "class_id": classes[item.caption], "box_caption": item.caption}
    score = _score(item, whose)
    if score is not None:
        data["box_caption"] = f"{item.caption} {score:.2f}"
        data["scores"] = {"score": score}
    return data


def _score(item: DetectedObject | Object, whose: str) -> float | None:
    """None for truths, and for a text answer's boxes, which have none of their own."""
    return float(item.score) if whose == "prediction" and isinstance(item, DetectedObject) else None


def _file_name(sample_id: str) -> str:
    return re.sub(r"[^\w.-]+", "_", sample_id)[-80:]
