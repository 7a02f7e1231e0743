"""What every prediction is made with, by the command line, by `Detector` and by judges alike."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from recipe.config import AnswersConfig, EvaluationConfig, PromptConfig, RecipeConfig
from recipe.configure import load_config
from recipe.data.chat import checked
from recipe.data.collate import collate_standard, one_each
from recipe.data.encode import Encoder
from recipe.images import displayed_size, open_image
from recipe.load import build_encoder, load_network
from recipe.metrics.calibration import read_calibration
from recipe.models.network import JointNetwork
from recipe.prediction.classes import ClassTrie, class_trie
from recipe.prediction.decode import Decoding, predict
from recipe.prediction.files import LEAST_SCORE, read_annotated_folder
from recipe.prediction.options import TILE_OVERLAP
from recipe.prediction.tiles import SAME_OBJECT_IOU, cut, merge_tiles, tiles_of
from recipe.schema import Example, Prediction, Sample
from recipe.upstream.trainer_section import view_trainer

log = logging.getLogger(__name__)

# What autocast computes in; None: no autocast.
AUTOCAST = {torch.float32: None, torch.float16: torch.float16, torch.bfloat16: torch.bfloat16}
DTYPES = {"fp32": torch.float32, "amp_fp16": torch.float16, "amp_bf16": torch.bfloat16}  # of `trainer.precision`
Answer = Literal["text", "boxes", "both"]
NO_HEAD = "was trained with detection_head: null: use --answer text, in Python answer='text'"


@dataclass(frozen=True)
class Request:
    """What a model is asked; None leaves it as in its run.

    Attributes:
        answer: The language model's text, the head's boxes, or both.
        prompt: In place of the run's prompt and candidate phrases.
        expressions: Candidate phrases.
        classes: One of these for each object, in place of a caption.
        score_threshold: Least score of an object.
        nms_iou: Of two boxes that overlap more, the worse is left out.
        max_new_tokens: Of an answer.
    """

    answer: Answer | None = None
    prompt: str | None = None
    expressions: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    score_threshold: float | None = None
    nms_iou: float | None = None
    max_new_tokens: int | None = None

    def evaluation(self, run: EvaluationConfig) -> EvaluationConfig:
        """Return the run's `evaluation` as asked."""
        names = ("score_threshold", "max_new_tokens", "nms_iou")
        changes: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.answer is not None:
            changes["answers"] = None if self.answer == "boxes" else AnswersConfig()
        if self.answer == "text":
            changes["max_captions"] = 0
        if self.classes is not None:
            changes["classes"] = list(self.classes)
        return replace(run, **changes)

    def question(self, run: PromptConfig) -> PromptConfig:
        """Return the run's `prompt` as asked; raise ValueError if a text cannot be asked."""
        if self.prompt is not None:
            run = replace(run, detect=checked(self.prompt), candidate_phrases=[])
        if self.expressions is not None:
            run = replace(run, candidate_phrases=[checked(text) for text in self.expressions])
        return run


@dataclass(frozen=True)
class Predictor:
    """What every batch of images is predicted with."""

    network: JointNetwork  # in evaluation mode, on `device`
    encoder: Encoder
    decoding: Decoding
    dtype: torch.dtype | None  # of autocast
    device: torch.device
    # Solved examples in order, one more than `num_teachers` if there are: an image is never its own teacher.
    teachers: Sequence[Sample]
    num_teachers: int  # shown before each image
    with_head: bool  # whether the head's objects are wanted
    batch_size: int
    tile: int | None = None  # side in pixels of the tiles that are predicted too
    overlap: float = TILE_OVERLAP  # of tiles

    def asked(self, request: Request, trie: Callable[[Sequence[str]], ClassTrie | None] | None = None) -> "Predictor":
        """Return the predictor of the same model that does as asked.

        Args:
            request: What differs from this predictor.
            trie: Makes the trie of classes, if the caller keeps tries.

        Raises:
            ValueError: The model has no head but boxes are asked, or a text or class cannot be used.
        """
        with_head = self.with_head if request.answer is None else request.answer != "text"
        if with_head and not self.network.has_head:
            raise ValueError(f"the model {NO_HEAD}")
        prompt, evaluation = request.question(self.decoding.prompt), request.evaluation(self.decoding.evaluation)
        classes = self.decoding.classes
        if request.classes is not None:
            make = trie or (lambda names: class_trie(names, self.decoding.tokenizer, self.network))
            classes = make(evaluation.classes)
        return replace(
            self,
            encoder=self.encoder if prompt == self.encoder.prompt else replace(self.encoder, prompt=prompt),
            decoding=replace(self.decoding, evaluation=evaluation, prompt=prompt, classes=classes),
            with_head=with_head,
        )

    def tiled(self, side: int | None, overlap: float | None = None) -> "Predictor":
        """Return the predictor that predicts tiles of larger images too; raise ValueError if there is no head."""
        if side is not None and not self.with_head:
            raise ValueError("tiles find objects of the head, which is not asked: leave out --tile")
        return replace(self, tile=side, overlap=TILE_OVERLAP if overlap is None else overlap)

    def teachers_of(self, data: bytes) -> list[Sample]:
        """Return the solved examples that are shown before an image."""
        return [teacher for teacher in self.teachers if teacher.image != data][: self.num_teachers]


def build_predictor(
    checkpoint: str | Path,
    request: Request,
    config: str | Path | None = None,
    calibration: Path | None = None,
    teachers: Path | None = None,
    num_teachers: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
) -> Predictor:
    """Return the network and the settings.

    On a GPU, float32 products are then computed in TF32 in the whole process, as Composer does in a run's evaluation.

    Args:
        checkpoint: As `recipe.load.load_network` reads it.
        request: What differs from the run.
        config: A yaml in place of the one saved with the checkpoint.
        calibration: A file of `recipe/eval.py`.
        teachers: A folder of solved examples.
        num_teachers: Of them shown before each image; default: as in training, else all.
        device: Default: the first GPU, else the CPU.
        dtype: Of the computation: float32, bfloat16 or float16. Default: the run's on a GPU, float32 on the CPU.
        batch_size: Images at once.

    Raises:
        ValueError: One of them cannot be used.
    """
    device = _device(device)
    if dtype not in (None, *AUTOCAST):
        raise ValueError(f"dtype is {dtype}: give one of {', '.join(map(str, AUTOCAST))}")
    samples = [] if teachers is None else read_annotated_folder(teachers)
    network, processor, run = load_network(checkpoint, load_config(str(config)) if config else None)
    if not network.has_head and request.answer not in (None, "text"):
        raise ValueError(f"{checkpoint} {NO_HEAD}")
    if calibration is not None:
        run = replace(run, evaluation=read_calibration(calibration, run.evaluation))
    shown = num_teachers or run.teachers.num_teachers or len(samples)
    if num_teachers is not None and num_teachers > len(samples):
        raise ValueError(f"{num_teachers} teachers are asked for, but {teachers} holds {len(samples)} annotated images")
    if num_teachers is None and shown < len(samples):
        log.warning("each image gets %d of %d teachers, as in training: or give --num-teachers N", shown, len(samples))
    autocast = _autocast_dtype(run, device) if dtype is None else AUTOCAST[dtype]
    made = predictor_of(network, processor, run, request, device, autocast, batch_size)
    return replace(made, teachers=samples[: shown + 1], num_teachers=shown)


def predictor_of(
    network: JointNetwork,
    processor: Any,
    run: RecipeConfig,
    request: Request,
    device: torch.device,
    autocast: torch.dtype | None = None,
    batch_size: int = 8,
) -> Predictor:
    """Return the predictor of a network in memory, which is put on the device; raises as `build_predictor`."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if not network.has_head:
        request = replace(request, answer="text")
    prompt, evaluation = request.question(run.prompt), request.evaluation(run.evaluation)
    classes = class_trie(evaluation.classes, processor.tokenizer, network) if network.has_head else None
    return Predictor(
        network=network.eval().to(device),
        encoder=build_encoder(processor, network, run.image, prompt, run.max_seq_len, keep_image=True),
        decoding=Decoding(processor.tokenizer, evaluation, prompt, classes),
        dtype=autocast,
        device=device,
        teachers=(),
        num_teachers=0,
        with_head=request.answer != "text",
        batch_size=batch_size,
    )


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used ({reason}): give cpu, or cuda:0 with a GPU") from error
    return device


def _autocast_dtype(run: RecipeConfig, device: torch.device) -> torch.dtype | None:
    precision = (view_trainer(run).precision or "amp_fp16").lower()  # Composer's default
    if precision not in DTYPES:
        raise ValueError(f"trainer.precision is {precision!r}: give a --config with one of {', '.join(DTYPES)}")
    return AUTOCAST[DTYPES[precision]] if device.type == "cuda" else None  # Composer ignores it on the CPU


def to_device(value: Any, device: torch.device) -> Any:
    """Return the batch with all its tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    return [to_device(item, device) for item in value] if isinstance(value, list) else value


def encode_image(data: bytes, name: str, encoder: Encoder, teachers: Sequence[Sample] = ()) -> Example:
    """Return the prompt about one image, after its teachers; raise ValueError if the model cannot take the image."""
    width, height = displayed_size(data)
    return encoder(Sample(name, data, width, height, objects=None), teachers)


def predict_examples(examples: Sequence[Example], predictor: Predictor) -> list[Prediction | str]:
    """Return per example its prediction, in the run's precision, or why it has none; halve what the GPU cannot hold."""
    batch = collate_standard(one_each(examples), predictor.encoder.pad_token_id)
    device, dtype = predictor.device, predictor.dtype
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            return [*predict(predictor.network, to_device(batch, device), predictor.decoding)[1]]
    except torch.OutOfMemoryError:
        if len(examples) == 1:
            return ["it does not fit on the GPU: lower image.max_pixels in a --config"]
    half = len(examples) // 2  # here, because the error above holds the batch's memory
    return predict_examples(examples[:half], predictor) + predict_examples(examples[half:], predictor)


def predict_images(examples: Sequence[Example], predictor: Predictor) -> list[Prediction | str]:
    """Return what `predict_examples` does, with what the tiles of each image show."""
    found = predict_examples(examples, predictor) if examples else []
    return [
        result if isinstance(result, str) else _add_tiles(example, result, predictor)
        for example, result in zip(examples, found, strict=True)
    ]


def _add_tiles(example: Example, prediction: Prediction, predictor: Predictor) -> Prediction | str:
    """Return the prediction of an image with what its tiles show, or why one of them has none."""
    size, sample, evaluation = predictor.tile, example.sample, predictor.decoding.evaluation
    tiles = [] if size is None else tiles_of(sample.width, sample.height, size, predictor.overlap)
    if not tiles:
        return prediction
    decoding = replace(predictor.decoding, evaluation=replace(evaluation, answers=None))
    image, found, teachers = open_image(sample.image), list[Prediction](), predictor.teachers_of(sample.image)
    for start in range(0, len(tiles), predictor.batch_size):
        part = tiles[start : start + predictor.batch_size]
        examples = [encode_image(cut(image, tile), sample.id, predictor.encoder, teachers) for tile in part]
        for result in predict_examples(examples, replace(predictor, decoding=decoding)):
            if isinstance(result, str):
                return result
            found.append(result)
    least = min(LEAST_SCORE, evaluation.score_threshold)
    iou = SAME_OBJECT_IOU if evaluation.nms_iou is None else evaluation.nms_iou
    return merge_tiles(prediction, list(zip(tiles, found, strict=True)), evaluation.score_threshold, least, iou)
