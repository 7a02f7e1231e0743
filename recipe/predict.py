"""Predict: `python recipe/predict.py --checkpoint CKPT --out DIR PICTURE [PICTURE ...]`; a folder or a glob will do.

Writes DIR/predictions.json (see `recipe/prediction/files.py`), DIR/coco_results.json and one drawn PNG a picture. A
picture that cannot be used has its reason in the JSON and on the terminal, the others are still done, and the exit
status is 1. Stopped or failed, it leaves in both files what was done until then. `python -m recipe.gallery` makes a
page of DIR, beside the truth where it is known.
"""

import sys

from recipe.configure import load_config, one_line_errors
from recipe.console import setup_logging
from recipe.prediction.options import read_command_line

if __name__ == "__main__":
    setup_logging()
    with one_line_errors():
        ARGUMENTS = read_command_line(sys.argv[1:])  # before the imports below, which take seconds

import argparse
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from composer.core import get_precision_context
from composer.devices import Device, DeviceGPU
from composer.utils import get_device
from PIL.Image import Image
from tqdm import tqdm

from convert.annotated import read_coco, read_image_ids
from recipe.build import build_encoder, load_model
from recipe.config import EvaluationConfig, PromptConfig, view_trainer
from recipe.data.chat import checked
from recipe.data.collate import collate_standard
from recipe.data.encode import Encoder
from recipe.images import displayed_size, open_image
from recipe.joint import JointModel
from recipe.metrics.calibration import read_calibration
from recipe.prediction.decode import predict_batch
from recipe.prediction.draw import draw_prediction
from recipe.prediction.files import (
    PREDICTIONS_FILE,
    ImageId,
    failed_row,
    prediction_row,
    refuse_to_overwrite,
    write_rows,
)
from recipe.prediction.inputs import entries_of, find_pictures, read_annotated_folder, unique_names
from recipe.redact import redact_text
from recipe.schema import Example, Prediction, Sample


def evaluation_of(args: argparse.Namespace, evaluation: EvaluationConfig) -> EvaluationConfig:
    """The run's way to predict, with what the command line says otherwise.

    Raises:
        ValueError: The calibration cannot be used.
    """
    if args.calibration is not None:
        evaluation = read_calibration(args.calibration, evaluation)
    names = ("score_threshold", "max_new_tokens", "num_beams", "nms_iou")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.answer is not None:
        changes["generate_answer"] = args.answer != "boxes"
    if args.answer == "text":
        changes["max_captions"] = 0
    return replace(evaluation, **changes)


def prompt_of(args: argparse.Namespace, prompt: PromptConfig) -> PromptConfig:
    """The run's prompt, with what the command line says otherwise.

    Raises:
        ValueError: A text cannot be asked.
    """
    if args.prompt is not None:
        prompt = replace(prompt, detect=checked(args.prompt), candidate_phrases=[])
    if args.expression is not None:
        prompt = replace(prompt, candidate_phrases=[checked(text) for text in args.expression])
    return prompt


@dataclass(frozen=True)
class Picture:
    """A file to predict.

    Attributes:
        path: As the command line names it.
        name: Of its entry and its drawing.
        image_id: In COCO results.
        truth: What is on it, where that is known.
    """

    path: Path
    name: str
    image_id: ImageId
    truth: Sample | None


@dataclass(frozen=True)
class Predictor:
    """What every batch of pictures is predicted with.

    Attributes:
        model: In evaluation mode, on `device`.
        encoder: Of the prompt that is asked.
        evaluation: The run's, changed by the command line.
        precision: The run was evaluated in; None: Composer's default for the device.
        device: Of the model.
        teachers: Solved examples shown before each picture, in order; one more than `num_teachers` where there are.
        num_teachers: How many each picture is shown: a picture is never its own teacher.
        with_head: The head's objects are wanted.
        with_drawings: So are drawn pictures.
    """

    model: JointModel
    encoder: Encoder
    evaluation: EvaluationConfig
    precision: str | None
    device: Device
    teachers: Sequence[Sample]
    num_teachers: int
    with_head: bool
    with_drawings: bool

    def teachers_of(self, picture: bytes) -> list[Sample]:
        """The solved examples that a picture is shown."""
        return [teacher for teacher in self.teachers if teacher.image != picture][: self.num_teachers]


def main(args: argparse.Namespace) -> int:
    """Predicts every picture that can be read; the number of those that could not.

    Raises:
        ValueError: Nothing can be predicted: no pictures, no checkpoint, teachers or prompt that cannot be used, or
            files that would be overwritten. Or the device's memory or the disk is full.
    """
    out = Path(args.out)
    paths, left_out = find_pictures(args.images, left_out=out)
    names = unique_names(paths, out)
    pictures = pictures_of(paths, names, args)
    if not args.overwrite:
        refuse_to_overwrite(out, names)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder --out {out}: {error.strerror}") from error
    predictor = build_predictor(args)
    rows: list[dict[str, Any]] = []
    try:
        with tqdm(total=len(pictures), unit=" pictures", disable=None) as progress:
            for start in range(0, len(pictures), args.batch_size):
                part = pictures[start : start + args.batch_size]
                rows += _predict_files(predictor, part, out)
                progress.update(len(part))
    finally:
        if rows:
            write_rows(out, rows)  # whatever ends it, what is done stays
    return report(rows, out, left_out)


def pictures_of(paths: Sequence[Path], names: Sequence[str], args: argparse.Namespace) -> list[Picture]:
    """The pictures, with the numbers and the truth that instances files give them.

    Raises:
        ValueError: Such a file cannot be read, a picture is not in it, or two are the same in it.
    """
    ids: Sequence[ImageId] = range(1, len(paths) + 1)
    if args.image_ids is not None:
        known = read_image_ids(args.image_ids)
        ids = [known[entry] for entry in entries_of(paths, known, f"--image-ids {args.image_ids}")]
    truths: Sequence[Sample | None] = [None] * len(paths)
    if args.truth is not None:
        samples = read_coco(args.truth)
        truths = [samples[entry] for entry in entries_of(paths, samples, f"--truth {args.truth}")]
    return [Picture(*row) for row in zip(paths, names, ids, truths, strict=True)]


def build_predictor(args: argparse.Namespace) -> Predictor:
    """The checkpoint's model, and what the command line asks of it."""
    device = get_device()
    teachers = [] if args.teachers is None else read_annotated_folder(args.teachers)
    model, processor, config = load_model(args.checkpoint, load_config(args.config) if args.config else None)
    evaluation, prompt = evaluation_of(args, config.evaluation), prompt_of(args, config.prompt)
    num_teachers = args.num_teachers or config.teachers.num_teachers or len(teachers)
    if args.num_teachers is not None and args.num_teachers > len(teachers):
        raise ValueError(f"--num-teachers {num_teachers}: {args.teachers} holds {len(teachers)} annotated pictures")
    if args.num_teachers is None and num_teachers < len(teachers):
        print(
            f"each picture is shown {num_teachers} of {len(teachers)} teachers, as in training: else --num-teachers N"
        )
    return Predictor(
        model=device.module_to_device(model.eval()),
        encoder=build_encoder(processor, model.model, config.image, prompt, config.max_seq_len, keep_image=True),
        evaluation=evaluation,
        precision=view_trainer(config).precision,
        device=device,
        teachers=teachers[: num_teachers + 1],
        num_teachers=num_teachers,
        with_head=args.answer != "text",
        with_drawings=not args.no_drawings,
    )


def read_picture(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the file: {error.strerror}") from error


def encode_picture(data: bytes, name: str, encoder: Encoder, teachers: Sequence[Sample] = ()) -> Example:
    """The prompt about one picture, after the turns of its teachers.

    Raises:
        ValueError: It is no picture, or the model cannot take it.
    """
    width, height = displayed_size(data)
    return encoder(Sample(name, data, width, height, objects=None), teachers)


def check_size(sample: Sample, truth: Sample | None) -> None:
    """Refuses the truth of another picture.

    Raises:
        ValueError: It is of another size.
    """
    if truth is not None and (truth.width, truth.height) != (sample.width, sample.height):
        raise ValueError(
            f"its truth is of {truth.width} x {truth.height} pixels, it of {sample.width} x {sample.height}: give the "
            "truth of these very pictures"
        )


def predict_examples(
    examples: Sequence[Example],
    model: JointModel,
    encoder: Encoder,
    evaluation: EvaluationConfig,
    precision: str | None,
    device: Device,
) -> list[Prediction]:
    """Return one prediction per example, in the precision that the run was evaluated in.

    Raises:
        ValueError: They are too many for the device's memory.
    """
    precision = precision or ("amp_fp16" if isinstance(device, DeviceGPU) else "fp32")
    batch = device.batch_to_device(collate_standard(examples, encoder.pad_token_id))
    try:
        with torch.inference_mode(), get_precision_context(precision):
            outputs = model(batch)
            return predict_batch(
                model.model,
                batch,
                outputs.detection,
                outputs.memory,
                encoder.tokenizer,
                evaluation,
                encoder.prompt,
            )
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{len(examples)} pictures at once are too many for the GPU: lower --batch-size") from error


def report(rows: Sequence[Mapping[str, Any]], out: Path, left_out: Counter[str]) -> int:
    """Prints what was done and what was not; the number of pictures that could not be used."""
    failed = [row for row in rows if row["error"] is not None]
    num_objects = sum(len(row["objects"] or row["answer_objects"] or ()) for row in rows)
    print(f"{len(rows) - len(failed)} pictures, {num_objects} objects: {out / PREDICTIONS_FILE}")
    cut = [row["file"] for row in rows if row["answer_is_cut"]]
    if cut:
        print(f"{len(cut)} answers lack their end, such as of {cut[0]}: raise --max-new-tokens", file=sys.stderr)
    if left_out:
        kinds = ", ".join(f"{suffix or 'no suffix'} {number}" for suffix, number in sorted(left_out.items()))
        print(f"left out {left_out.total()} files of folders that are no pictures ({kinds})", file=sys.stderr)
    for row in failed:
        print(f"failed: {row['file']}: {row['error']}", file=sys.stderr)
    return len(failed)


def _predict_files(predictor: Predictor, pictures: Sequence[Picture], out: Path) -> list[dict[str, Any]]:
    """One row a picture, in order; draws those that could be read."""
    encoder, evaluation = predictor.encoder, predictor.evaluation
    examples: list[Example] = []
    shown: list[tuple[Sample | None, list[Sample]]] = []
    failures: dict[str, ValueError] = {}
    for picture in pictures:
        try:
            data = read_picture(picture.path)
            teachers = predictor.teachers_of(data)
            example = encode_picture(data, picture.name, encoder, teachers)
            check_size(example.sample, picture.truth)
            examples.append(example)
            shown.append((picture.truth, teachers))
        except ValueError as error:
            failures[picture.name] = error
    threshold, with_head = evaluation.score_threshold, predictor.with_head
    predictions = (
        predict_examples(examples, predictor.model, encoder, evaluation, predictor.precision, predictor.device)
        if examples
        else []
    )
    for example, (truth, teachers), prediction in zip(examples, shown, predictions, strict=True):
        if predictor.with_drawings:
            image = open_image(example.sample.image)
            drawing = draw_prediction(image, prediction, truth, threshold, teachers, with_head)
            _save(drawing, out / f"{prediction.id}.png")
    found = {prediction.id: prediction for prediction in predictions}
    return [
        prediction_row(picture.path, picture.image_id, found[picture.name], threshold, with_head)
        if picture.name in found
        else failed_row(picture.name, picture.path, picture.image_id, failures[picture.name])
        for picture in pictures
    ]


def _save(drawing: Image, path: Path) -> None:
    try:
        drawing.save(path, compress_level=1)  # the default takes longer than the rest of the drawing
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}: give another --out") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through `finally`, as Ctrl-C
    try:
        sys.exit(1 if main(ARGUMENTS) else 0)
    except ValueError as error:
        sys.exit(redact_text(f"error: {error}"))
