"""A trained model in three lines.

from recipe import Detector
detector = Detector.from_pretrained("exported")
print(detector("street.jpg").objects)
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from recipe.images import displayed, uncompressed
from recipe.inference.predictor import (
    Answer,
    Predictor,
    Request,
    build_predictor,
    encode_image,
    predict_images,
)
from recipe.prediction.classes import class_trie
from recipe.prediction.files import PredictedFile, category_ids, coco_results, rounded
from recipe.publish.hub import fetch_model, is_hub_name
from recipe.schema import Example, ImageId, Prediction

if TYPE_CHECKING:
    from supervision import Detections  # pyright: ignore[reportMissingImports]

# A file's path, a whole file's bytes, an image of Pillow, or RGB pixels of 8 bits.
ImageLike = str | os.PathLike[str] | bytes | Image.Image | UInt8[np.ndarray, "height width 3"]
_KINDS = "a path, the bytes of a file, a PIL image, or a numpy array (height, width, 3) of uint8"
_ONE_IMAGE = (str, os.PathLike, bytes, Image.Image, np.ndarray)
_KEPT_CLASS_LISTS = 8


class Found(Prediction):
    """The prediction of one image, which other libraries read."""

    def to_coco(self, image_id: ImageId, categories: dict[str, ImageId] | None = None) -> list[dict[str, Any]]:
        """Return COCO results, as `predict.py` writes them; see `recipe.prediction.files.coco_results`.

        Args:
            image_id: Of all results.
            categories: Id by name; a box has the category that is named like its caption. Default: all are of category
                1, to be evaluated with useCats=0.
        """
        known = None if categories is None else category_ids(categories.items())
        return coco_results([PredictedFile(self.id, "", image_id, self)], known)

    def to_supervision(self, classes: Sequence[str] | None = None) -> "Detections":
        """Return the head's objects as supervision's `Detections`, with their captions as `class_name`.

        Args:
            classes: `class_id` is the position of a caption in them, -1 if it is not there. Default: the captions of
                this image, sorted.

        Raises:
            ImportError: supervision is not installed.
        """
        try:
            from supervision import Detections  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("to_supervision needs supervision: pip install '.[supervision]'") from error
        captions = [item.caption for item in self.objects]
        number = {name: place for place, name in enumerate(sorted(set(captions)) if classes is None else classes)}
        return Detections(
            xyxy=np.array([item.box for item in self.objects], dtype=np.float32).reshape(-1, 4),
            confidence=np.array([item.score for item in self.objects], dtype=np.float32),
            class_id=np.array([number.get(caption, -1) for caption in captions], dtype=int),
            data={"class_name": np.array(captions, dtype=str)},
        )


class Detector:
    """A trained model that finds and describes the objects of images.

    It may be called by several threads: images are decoded side by side, and the model runs for one call at a time.

    Attributes:
        predictor: The model, and what it is asked unless a call says otherwise.
    """

    def __init__(self, predictor: Predictor):
        self.predictor = predictor
        # The forward pass reads its features by hooks, and `generate` keeps positions in the model.
        self._lock = Lock()
        tokenizer, network = predictor.decoding.tokenizer, predictor.network
        self._trie = lru_cache(_KEPT_CLASS_LISTS)(lambda names: class_trie(names, tokenizer, network))

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        config: str | os.PathLike[str] | None = None,
        calibration: str | os.PathLike[str] | None = None,
        teachers: str | os.PathLike[str] | None = None,
        num_teachers: int | None = None,
        batch_size: int = 8,
    ) -> "Detector":
        """Load a model.

        Args:
            name: A folder of `recipe/export.py`, a checkpoint of Composer, or a name on the Hugging Face hub.
            device: Default: the first GPU, else the CPU.
            dtype: Of the computation: float32, bfloat16 or float16. Default: the run's on a GPU, float32 on the CPU.
            revision: On the hub.
            config: A yaml in place of the one saved with the model.
            calibration: A file of `recipe/eval.py`; an export can hold its values already.
            teachers: A folder of solved examples, which are shown before each image.
            num_teachers: How many of them; default: as in training, else all.
            batch_size: Images at once.

        Raises:
            ValueError: One of them cannot be used.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: must be 1 or more")
        source = str(fetch_model(str(name), revision) if is_hub_name(str(name)) else name)
        return cls(
            build_predictor(
                source,
                Request(),
                config=None if config is None else Path(config),
                calibration=None if calibration is None else Path(calibration),
                teachers=None if teachers is None else Path(teachers),
                num_teachers=num_teachers,
                device=device,
                dtype=dtype,
                batch_size=batch_size,
            )
        )

    @overload
    def __call__(
        self,
        images: ImageLike,
        prompt: str | None = None,
        classes: Sequence[str] | None = None,
        threshold: float | None = None,
        expressions: Sequence[str] | None = None,
        answer: Answer | None = None,
        nms_iou: float | None = None,
        tile: int | None = None,
    ) -> Found: ...
    @overload
    def __call__(
        self,
        images: Sequence[ImageLike],
        prompt: str | None = None,
        classes: Sequence[str] | None = None,
        threshold: float | None = None,
        expressions: Sequence[str] | None = None,
        answer: Answer | None = None,
        nms_iou: float | None = None,
        tile: int | None = None,
    ) -> list[Found]: ...

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        prompt: str | None = None,
        classes: Sequence[str] | None = None,
        threshold: float | None = None,
        expressions: Sequence[str] | None = None,
        answer: Answer | None = None,
        nms_iou: float | None = None,
        tile: int | None = None,
    ) -> Found | list[Found]:
        """Return the prediction of one image, or a list of those of several, in order.

        Boxes are xyxy in pixels of the displayed image, with the numbers that `predict.py` writes.

        Args:
            images: One or a list; each a path, the bytes of a file, a PIL image, or RGB pixels (height, width, 3) of
                uint8. Of a list, `batch_size` are predicted at once.
            prompt: Asked instead of the run's prompt and candidate phrases.
            classes: One of these for each object, in place of a caption; an empty list: captions.
            threshold: Least score of an object. Default: the run's, or that of its calibration.
            expressions: Look for these.
            answer: `boxes` of the head, `text` of the language model, or `both`. Default: the run's.
            nms_iou: Leave out the worse of two boxes that overlap more.
            tile: Also predict overlapping tiles of that many pixels of larger images.

        Raises:
            ValueError: An image cannot be used, named by its position, or an argument has no meaning.
        """
        request = Request(answer, prompt, expressions, classes, threshold, nms_iou)
        predictor = self.asked(request).tiled(tile)
        if isinstance(images, _ONE_IMAGE) or not isinstance(images, Sequence):
            return self._batch([images], 0, predictor)[0]
        size = predictor.batch_size
        parts = (self._batch(images[start : start + size], start, predictor) for start in range(0, len(images), size))
        return [found for part in parts for found in part]

    def asked(self, request: Request) -> Predictor:
        """Return what images are encoded and predicted with if `request` is asked; raise ValueError if it cannot be."""
        for name in ("score_threshold", "nms_iou"):
            value = getattr(request, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: must be between 0 and 1")
        for name in ("classes", "expressions"):
            if isinstance(getattr(request, name), str):
                raise ValueError(f"{name} is a text: give a list of texts")
        return self.predictor.asked(request, lambda names: self._trie(tuple(names)))

    def encode(self, image: ImageLike, name: str, predictor: Predictor) -> Example:
        """Return the prompt about an image; raise ValueError if the image cannot be used."""
        data = _file_of(image)
        return encode_image(data, name, predictor.encoder, predictor.teachers_of(data))

    def predict(self, examples: Sequence[Example], predictor: Predictor) -> list[Found | str]:
        """Return per example of `encode` its prediction, or why it has none."""
        with self._lock:
            results = predict_images(examples, predictor)
        threshold, with_head = predictor.decoding.evaluation.score_threshold, predictor.with_head
        return [
            result if isinstance(result, str) else Found(**vars(rounded(result, threshold, with_head)))
            for result in results
        ]

    def _batch(self, images: Sequence[ImageLike], start: int, predictor: Predictor) -> list[Found]:
        examples: list[Example] = []
        for place, image in enumerate(images, start):
            is_path = isinstance(image, str | os.PathLike)
            name = str(image) if is_path else str(place)
            try:
                examples.append(self.encode(image, name, predictor))
            except ValueError as error:
                where = f"images[{place}] {name}" if is_path else f"images[{place}]"
                raise ValueError(f"{where}: {str(error).removeprefix(f'sample {name!r}: ')}") from error
        found: list[Found] = []
        for place, result in enumerate(self.predict(examples, predictor), start):
            if isinstance(result, str):
                raise ValueError(f"images[{place}]: {result}")
            found.append(result)
        return found


def _file_of(image: ImageLike) -> bytes:
    """Return an image as an image file; raise ValueError if it is none."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the file: {error.strerror}") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an array {image.shape} of {image.dtype} is not (height, width, 3) of uint8, RGB")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__} is not an image: give {_KINDS}")
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels: give an image with pixels")
    try:
        return uncompressed(displayed(image))
    except OSError as error:  # Pillow reads the file only now
        raise ValueError(f"cannot decode it: {error}") from error
