"""A model for lmms-eval: `python -m lmms_eval --model recipe_detector --model_args pretrained=FOLDER --tasks odinw13`.

Every answer is made by the functions that `recipe/predict.py` calls. Questions for boxes (see `tasks.py`) are answered
by the head, or with `answer=text` by the language model; all others by the language model.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, NoReturn

from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image
from tqdm import tqdm

from recipe.config import AnswersConfig, EvaluationConfig
from recipe.inference.predictor import Predictor, predict_examples
from recipe.judges.tasks import BoxQuestion, box_question, boxes_text, cut_at
from recipe.predict import build_predictor
from recipe.prediction.classes import class_trie
from recipe.prediction.files import rounded
from recipe.prediction.options import parse
from recipe.redact import redact_text
from recipe.schema import DetectedObject, Example, Prediction, Sample

log = logging.getLogger(__name__)

OPTIONS = ("answer", "calibration", "config", "nms_iou", "num_teachers", "score_threshold", "teachers")
PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")  # others are not stored without loss, but as RGB


@dataclass(frozen=True)
class Asked:
    """One request of lmms-eval."""

    name: str  # of task and document, for messages
    prompt: str
    boxes: BoxQuestion | None  # None: for text
    settings: dict[str, Any]  # of generation
    make_images: Any  # document → its images
    document: Any

    @property
    def kind(self) -> tuple[Any, ...]:
        """Return what the requests of one batch share."""
        classes = self.boxes.phrases if self.boxes is not None and self.boxes.of_classes else None
        return self.boxes is None, classes, self.settings.get("max_new_tokens")


class RecipeDetector(lmms):
    """The model; its arguments are those of lmms-eval and, by the same names, `OPTIONS` of `recipe/predict.py`."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        try:
            self.batch_size = _batch_size(batch_size, max_batch_size)
            self.predictor = _predictor(pretrained, options)
            kind = self.predictor.device.type
            if device is not None and device.split(":")[0] != kind:
                raise ValueError(
                    f"--device {device}: the model runs on {kind}; leave it out, or set CUDA_VISIBLE_DEVICES"
                )
        except ValueError as error:
            _exit(error)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return one answer per request, in order: to a known question for boxes the list of `boxes_text`, else text.

        An image that cannot be used has an empty answer, which is logged.
        """
        asked = [self._asked(request.args) for request in requests]
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for place, question in enumerate(asked):
            groups[question.kind].append(place)
        answers = [""] * len(asked)
        try:
            predictors = {kind: self._predictor_of(asked[places[0]]) for kind, places in groups.items()}
            with tqdm(total=len(asked), unit=" requests", disable=None) as progress:
                for kind, places in groups.items():
                    for start in range(0, len(places), self.batch_size):
                        batch = places[start : start + self.batch_size]
                        texts = self._answer([asked[place] for place in batch], predictors[kind])
                        for place, text in zip(batch, texts, strict=True):
                            answers[place] = text
                        progress.update(len(batch))
        except ValueError as error:
            _exit(error)
        _warn_of_sampling(asked)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Raise NotImplementedError: a list of boxes has no likelihood."""
        raise NotImplementedError(
            "recipe_detector answers with boxes or text; choose tasks of output_type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Raise NotImplementedError: the model is asked once per image."""
        raise NotImplementedError("recipe_detector answers one question per image; choose tasks of one round")

    def _asked(self, arguments: Sequence[Any]) -> Asked:
        prompt, settings, make_images, document, task, split = arguments
        name = f"{task}, document {document}"
        return Asked(name, prompt, box_question(prompt), settings, make_images, self.task_dict[task][split][document])

    def _predictor_of(self, asked: Asked) -> Predictor:
        """Return the predictor for all requests of a kind, given one; raise ValueError if it cannot be answered."""
        _only_image(asked)
        predictor, boxes = self.predictor, asked.boxes
        by_head = boxes is not None and predictor.with_head
        classes = boxes.phrases if boxes is not None and by_head and boxes.of_classes else ()
        names = classes if len(classes) > 1 else ()
        run = predictor.decoding.evaluation
        evaluation: EvaluationConfig = replace(
            run,
            answers=None if by_head else AnswersConfig(),
            max_captions=run.max_captions if names else 0,
            max_new_tokens=asked.settings.get("max_new_tokens") or run.max_new_tokens,
            classes=list(names),
        )
        decoding = predictor.decoding
        trie = class_trie(names, decoding.tokenizer, predictor.network)
        return replace(predictor, decoding=replace(decoding, evaluation=evaluation, classes=trie))

    def _answer(self, batch: Sequence[Asked], predictor: Predictor) -> list[str]:
        """Return the answers to requests of one kind."""
        examples: list[Example] = []
        failed: dict[int, str] = {}
        for place, asked in enumerate(batch):
            image = _only_image(asked)
            try:
                examples.append(_example(asked, image, predictor))
            except ValueError as error:
                failed[place] = str(error)
        found = iter(predict_examples(examples, predictor) if examples else ())
        answers: list[str] = []
        for place, asked in enumerate(batch):
            result = failed[place] if place in failed else next(found)
            if isinstance(result, str):
                log.warning("%s is not answered: %s", asked.name, result)
                answers.append("")
            elif asked.boxes is None:
                if result.answer_is_cut:
                    log.warning("%s: the answer was cut off at max_new_tokens", asked.name)
                answers.append(cut_at(result.answer or "", _ends(asked.settings)))
            else:
                answers.append(_boxes(asked.boxes, result, predictor))
        return answers


def _exit(error: ValueError) -> NoReturn:
    # For any exception lmms-eval prints a traceback and ends with status 0.
    raise SystemExit(redact_text(f"error: {error}")) from None


def _batch_size(value: int | str, longest: int | None) -> int:
    """Return lmms-eval's --batch_size; raise ValueError if it is not a number, or there are several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("recipe_detector runs in one process: start one per GPU, each with other --tasks")
    if longest is not None or not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"--batch_size {value}: give a number of images, 1 or more, and no --max_batch_size")
    return int(value)


def _predictor(pretrained: str, options: dict[str, Any]) -> Predictor:
    """Return what `predict.py` predicts with; raise ValueError if an argument is unknown or cannot be used."""
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"--model_args {unknown[0]}=...: not one of pretrained, {', '.join(OPTIONS)}")
    if options.get("answer", "boxes") not in ("boxes", "text"):
        raise ValueError(
            f"--model_args answer={options['answer']}: give boxes (the head's) or text (the language model's)"
        )
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return build_predictor(parse(["no image", "--checkpoint", str(pretrained), "--out", "nowhere", *flags]))


def _only_image(asked: Asked) -> Image.Image:
    """Return the image of a request; raise ValueError if it has none, several or another medium."""
    images = list(asked.make_images(asked.document) or ())
    if len(images) != 1 or not isinstance(images[0], Image.Image):
        kinds = ", ".join(sorted({type(image).__name__ for image in images}))
        raise ValueError(
            f"{asked.name} has {len(images)} media ({kinds or 'none'}): leave out tasks without one image each"
        )
    return images[0]


def _example(asked: Asked, image: Image.Image, predictor: Predictor) -> Example:
    """Return the prompt about an image; raise ValueError if the model cannot take it."""
    file = BytesIO()
    # Without EXIF: a task's boxes refer to the pixels as it gives them.
    (image if image.mode in PNG_MODES else image.convert("RGB")).save(file, "PNG", compress_level=1, exif=b"")
    sample = Sample(asked.name, file.getvalue(), *image.size, objects=None)
    encoder = predictor.encoder
    if asked.boxes is None:
        sample = replace(sample, messages=({"role": "user", "content": asked.prompt},))
    elif not (predictor.with_head and asked.boxes.of_classes):  # the head is asked as in training, then scores classes
        encoder = replace(encoder, prompt=replace(encoder.prompt, candidate_phrases=list(asked.boxes.phrases)))
    return encoder(sample, predictor.teachers[: predictor.num_teachers])


def _boxes(question: BoxQuestion, result: Prediction, predictor: Predictor) -> str:
    """Return the answer to a question for boxes: of classes all boxes, else the best one."""
    threshold = predictor.decoding.evaluation.score_threshold if question.of_classes else 0.0
    result = rounded(result, threshold)
    objects: Sequence[DetectedObject] = result.objects if predictor.with_head else result.answer_objects or ()
    if not question.of_classes:
        objects = [replace(item, caption=question.phrases[0]) for item in objects[:1]]
    elif len(question.phrases) == 1:
        objects = [replace(item, caption=question.phrases[0]) for item in objects]
    best = [item.per_class()[0] for item in objects]
    return boxes_text([item for item in best if item.caption], (result.width, result.height), question.unit)


def _ends(settings: dict[str, Any]) -> list[str]:
    ends = settings.get("until") or []
    return [ends] if isinstance(ends, str) else list(ends)


def _warn_of_sampling(asked: Sequence[Asked]) -> None:
    """Log once if a task wants its answers sampled."""
    for question in asked:
        settings = question.settings
        if settings.get("do_sample") or (settings.get("num_beams") or 1) > 1:
            log.warning("%s asks for sampling or beams; recipe_detector answers greedily", question.name)
            return
