"""Draw predicted and true boxes with their captions at every evaluation."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from PIL import Image

from recipe.draw import draw_gallery, draw_prediction
from recipe.pictures import open_image

GALLERY_COLUMNS = 4


class LogPredictions(Callback):
    """Draws the first pictures of every evaluation on rank 0; touches no random state and no tensor of the model.

    Writes `FOLDER/{batch:06d}/{number}_{sample id}.png` and `gallery.png`, and logs the gallery to every logger that
    takes images.

    Args:
        num_images: Pictures to draw; those of the first evaluation samples that have one.
        folder: Of the pictures.
        score_threshold: Objects below it are not drawn.
    """

    def __init__(self, num_images: int, folder: str | Path, score_threshold: float):
        self.num_images = num_images
        self.folder = Path(folder)
        self.score_threshold = score_threshold
        self._pictures: list[Image.Image] = []

    def eval_start(self, state: State, logger: Logger) -> None:
        """Forgets the evaluation before."""
        self._pictures = []

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Draws this microbatch's pictures until there are enough."""
        if dist.get_global_rank() != 0 or len(self._pictures) >= self.num_images:
            return
        outputs: Any = state.outputs  # recipe.joint's evaluation outputs
        for sample, prediction in zip(state.batch["samples"], outputs.predictions, strict=True):
            if sample.image and len(self._pictures) < self.num_images:
                picture = draw_prediction(open_image(sample.image), prediction, sample, self.score_threshold)
                self._save(picture, f"{len(self._pictures):02d}_{_file_name(sample.id)}.png", state)
                self._pictures.append(picture)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Saves and logs the gallery."""
        if not self._pictures:
            return
        gallery = draw_gallery(self._pictures, columns=min(GALLERY_COLUMNS, len(self._pictures)))
        self._save(gallery, "gallery.png", state)
        logger.log_images(np.asarray(gallery), name="predictions", channels_last=True, use_table=False)
        self._pictures = []

    def _save(self, picture: Image.Image, name: str, state: State) -> None:
        folder = self.folder / f"{state.timestamp.batch.value:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)


def _file_name(sample_id: str) -> str:
    return re.sub(r"[^\w.-]+", "_", sample_id)[-80:]
