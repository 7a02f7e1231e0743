"""Show samples: the first ones decoded, as the model sees them, and predictions drawn at every evaluation."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger, WandBLogger
from composer.utils import dist
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from recipe.data.encode import solved_images
from recipe.data.image import shown_pixels
from recipe.data.stream import PackStream
from recipe.images import open_image
from recipe.joint import EvaluationScope
from recipe.prediction.draw import draw_gallery, draw_prediction, draw_samples
from recipe.schema import Batch, DetectedObject, Object, Prediction, Role, Sample, Target

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

NUM_AUGMENTED = 12  # images that are drawn as augmentation shows them
AUGMENTED_FILE = "augmented_samples.png"
_IMAGE_PAD = "<|image_pad|>"
OVERLAY_SIZE = 1024  # longest side in pixels of an image that W&B draws boxes on
TABLE_COLUMNS = ["image", "whose", "score", "caption", "x1", "y1", "x2", "y2"]
_TAGS = {Role.NONE: "prompt", Role.TEACHER: "teacher answer", Role.STUDENT: "student answer"}


class LogFirstSample(Callback):
    """Writes rank 0's first sample to `folder/first_train_sample.txt` and `folder/first_eval_sample.txt`.

    With augmentation a new run also writes its first images as they are shown, to `folder/augmented_samples.png` and
    to every logger that takes images.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: str | Path):
        self.tokenizer = tokenizer
        self.folder = Path(folder)
        self._shown: set[str] = set()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Draw the first images of a new run as augmentation shows them."""
        loader = state.train_dataloader
        dataset = loader.dataset if isinstance(loader, DataLoader) else None
        if int(state.timestamp.batch) or dist.get_global_rank() != 0 or not isinstance(dataset, PackStream):
            return
        if dataset.maker.augmentation is not None and (shown := first_images(dataset, NUM_AUGMENTED)):
            drawing = draw_samples(shown)
            is_written = write(self.folder / AUGMENTED_FILE, drawing.save)
            logger.log_images(np.asarray(drawing), name="augmented_samples", channels_last=True, use_table=False)
            if is_written:
                log.info("first %d augmented images: %s", len(shown), self.folder / AUGMENTED_FILE)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Write the first training sample."""
        self._show("train", state.batch)

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """Write the first evaluation sample."""
        self._show("eval", state.batch)

    def _show(self, name: str, microbatches: Sequence[Batch]) -> None:
        if name in self._shown or dist.get_global_rank() != 0:
            return
        self._shown.add(name)
        path, text = self.folder / f"first_{name}_sample.txt", describe_first_sample(microbatches[0], self.tokenizer)
        if write(path, lambda path: path.write_text(text + "\n", encoding="utf-8")):
            log.info("first %s sample, as the model sees it: %s", name, path)


def write(path: Path, action: Callable[[Path], object]) -> bool:
    """Make a file's folder and the file; a full disk is only logged, since training does not need it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        action(path)
    except OSError as error:
        log.error("cannot write %s: %s; training continues: free disk space", path, error)
        return False
    return True


def first_images(dataset: PackStream, count: int) -> list[tuple[Image.Image, Sample, str]]:
    """Return the first images of epoch 0 as training shows them, each with its sample and how it is shown."""
    plan, maker, found = dataset.plan(0), dataset.maker, list[tuple[Image.Image, Sample, str]]()
    for position, occurrence in zip(plan.samples[: 4 * count].tolist(), plan.occurrences.tolist(), strict=False):
        with suppress(ValueError):  # an image that cannot be used: the loader says why
            sample, _, (*_, drawn) = maker.shown(dataset[position], 0, occurrence)
            if drawn is not None and len(found) < count:
                pixels = shown_pixels(sample.image, maker.encoder.image_spec, drawn)
                image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
                what = "part" if drawn.crop != (0, 0, *drawn.stored) else "whole"
                title = f"{'flipped ' * drawn.flip}{what}, {image.width} x {image.height}"
                found.append((image, sample, title))
    return found


def describe_first_sample(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the first sample as text: its segments of equal role, image placeholders collapsed, and its target."""
    length = _first_length(batch)
    ids = batch["input_ids"][0, :length].tolist()
    roles = torch.full((length,), int(Role.NONE))
    supervised = batch["label_index"] + 1  # the position of each label in the flattened tokens
    inside = supervised < length
    roles[supervised[inside].cpu()] = batch["label_roles"][inside].cpu()

    grids = iter(batch["image_grid_thw"].tolist())
    parts = [f"sample {batch['samples'][0].id}, {length} tokens"]
    parts += [f"[shown as] {batch['drawn'][0]}"] if batch["drawn"][0] else []
    position = 0
    for role, group in groupby(roles.tolist()):
        count = len(list(group))
        text = _decode(ids[position : position + count], tokenizer, grids)
        parts.append(f"[{_TAGS[Role(role)]}, {count} tokens]\n{text}")
        position += count
    for owner, view, target in zip(batch["student_samples"], batch["student_views"], batch["targets"], strict=True):
        if owner == 0:
            whose = f" of {view.id}" if batch["samples"][0].further else ""
            parts.append(_describe_target(target, tokenizer, whose))
    return "\n".join(parts)


def _first_length(batch: Batch) -> int:
    if batch["attention_mask"] is not None:
        return int(batch["attention_mask"][0].sum())
    starts = (batch["position_ids"][0, 0] == 0).nonzero()[:, 0].tolist()  # packed: row 0 restarts at every sample
    return starts[1] if len(starts) > 1 else batch["input_ids"].shape[1]


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, grids: Iterator[list[int]]) -> str:
    image_pad = tokenizer.get_vocab()[_IMAGE_PAD]
    texts = []
    for is_image, group in groupby(ids, key=lambda token: token == image_pad):
        tokens = list(group)
        if is_image:
            time, height, width = next(grids)
            merge = math.isqrt(time * height * width // len(tokens))
            texts.append(f"<image {width // merge}x{height // merge}>")
        else:
            texts.append(str(tokenizer.decode(tokens)))
    return "".join(texts)


def _describe_target(target: Target | None, tokenizer: PreTrainedTokenizerBase, whose: str) -> str:
    if target is None:
        return f"[target{whose}] not annotated: no detection loss"
    lines = [f"[target{whose}] {len(target['boxes'])} objects, boxes as centre and size in 0 to 1"]
    for box, caption_ids in zip(target["boxes"].tolist(), target["caption_ids"], strict=True):
        caption = tokenizer.decode(caption_ids[caption_ids >= 0].tolist(), skip_special_tokens=True)  # -1: padding
        lines.append(f"  ({', '.join(f'{value:.3f}' for value in box)}) {caption}")
    return "\n".join(lines)


class LogPredictions(Callback):
    """Draws the first images of every evaluation on rank 0; touches no random state and no tensor of the model.

    Writes `FOLDER/{batch:06d}/{number}_{sample id}.png` and `gallery.png`, and logs the gallery to every logger that
    takes images. Logs a table of the boxes to every logger that takes tables. Logs the images to W&B with their boxes
    as overlays, which its page shows and hides by class and score.

    Args:
        num_images: Drawn per evaluation: the first ones that the head solves.
        folder: Gets the drawings.
        score_threshold: Objects below it are neither drawn nor logged.
        scope: Learns which samples are drawn, and how long it takes.
    """

    def __init__(
        self, num_images: int, folder: str | Path, score_threshold: float, scope: EvaluationScope | None = None
    ):
        self.scope = scope or EvaluationScope()
        self.num_images = num_images
        self.folder = Path(folder)
        self.score_threshold = score_threshold
        self._shown: list[tuple[Sample, Prediction]] = []

    def eval_start(self, state: State, logger: Logger) -> None:
        """Forget the previous evaluation."""
        self._shown = []

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        """Choose this microbatch's images, until there are enough."""
        left = self.num_images - len(self._shown) if dist.get_global_rank() == 0 else 0
        solved = [sample.per_image()[number] for sample in state.batch["samples"] for number in solved_images(sample)]
        self.scope.drawn = [view.id for view in solved if view.image][:left]

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Draw them."""
        if not self.scope.drawn:
            return
        outputs: Any = state.outputs  # recipe.joint's evaluation outputs
        for sample, prediction in zip(outputs.samples, outputs.predictions, strict=True):
            # The one that fills a skipped sample's place has the id of another, and no file.
            if sample.image and sample.id in self.scope.drawn and len(self._shown) < self.num_images:
                drawing = draw_prediction(open_image(sample.image), prediction, sample, self.score_threshold)
                file_name = re.sub(r"[^\w.-]+", "_", sample.id)[-80:]
                self._save(drawing, f"{len(self._shown):02d}_{file_name}.png", state)
                self._shown.append((sample, prediction))
        self.scope.lap("drawing")

    def eval_end(self, state: State, logger: Logger) -> None:
        """Save and log the gallery, and log table and overlays."""
        if not self._shown:
            return
        gallery = draw_gallery(self._shown, self.score_threshold)
        self._save(gallery, "gallery.png", state)
        logger.log_images(np.asarray(gallery), name="predictions", channels_last=True, use_table=False)
        logger.log_table(TABLE_COLUMNS, table_rows(self._shown, self.score_threshold), name="predictions_table")
        for destination in logger.destinations:
            if isinstance(destination, WandBLogger):
                import wandb  # half a second, for those who use it

                if wandb.run is None:
                    continue
                # Through the logger's own method: a guarded logger does not end the run if it fails.
                images = wandb_images(self._shown, self.score_threshold)
                destination.log_metrics({"predictions_boxes": images}, step=state.timestamp.batch.value)
        self._shown = []

    def _save(self, drawing: Image.Image, name: str, state: State) -> None:
        write(self.folder / f"{state.timestamp.batch.value:06d}" / name, drawing.save)


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


def wandb_images(shown: Sequence[tuple[Sample, Prediction]], score_threshold: float) -> "list[wandb.Image]":
    """Return the images with their boxes as W&B overlays; a caption is a class, the same in all images.

    W&B displays the images of a step correctly only if they have one size, so smaller ones get a margin.
    """
    import wandb

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
