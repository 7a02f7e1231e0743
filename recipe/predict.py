"""Predict: `python recipe/predict.py --checkpoint CKPT --out DIR IMAGE [IMAGE ...]`; IMAGE may be a folder or a glob.

Writes DIR/predictions.json (see `recipe/prediction/files.py`), DIR/coco_results.json and one drawing per image. If an
image cannot be used, the JSON and the terminal say why, the others are still predicted, and the exit status is 1. If
the command is stopped or fails, both files keep what was done. `python -m recipe.gallery` makes a page of DIR.
"""

import sys

from recipe.configure import load_config, one_line_errors
from recipe.console import setup_logging
from recipe.prediction.options import TILE_OVERLAP, parse
from recipe.upstream.trainer_section import view_trainer

if __name__ == "__main__":
    setup_logging()
    with one_line_errors():
        parse(sys.argv[1:])  # before the imports below, which take seconds

import argparse
import itertools
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from convert.annotated import read_categories, read_coco, read_image_ids
from recipe.config import AnswersConfig, EvaluationConfig, PromptConfig
from recipe.data.chat import checked
from recipe.data.collate import collate_standard, one_each
from recipe.data.encode import Encoder
from recipe.images import displayed_size, open_image
from recipe.load import build_encoder, load_network
from recipe.metrics.calibration import read_calibration
from recipe.models.network import JointNetwork
from recipe.prediction.classes import class_trie
from recipe.prediction.decode import Decoding, predict
from recipe.prediction.draw import draw_prediction
from recipe.prediction.files import (
    COCO_RESULTS_FILE,
    LEAST_SCORE,
    NO_CATEGORY,
    PREDICTIONS_FILE,
    PredictedFile,
    category_ids,
    coco_results,
    entries_of,
    find_images,
    read_annotated_folder,
    refuse_to_overwrite,
    rounded,
    rounded_score,
    unique_names,
    with_objects_below,
    write_entries,
)
from recipe.prediction.tiles import SAME_OBJECT_IOU, cut, merge_tiles, tiles_of
from recipe.redact import redact_text
from recipe.schema import Example, ImageId, Prediction, Sample

DTYPES = {"fp32": None, "amp_fp16": torch.float16, "amp_bf16": torch.bfloat16}  # of autocast; None: no autocast


def evaluation_of(args: argparse.Namespace, evaluation: EvaluationConfig) -> EvaluationConfig:
    """Return the run's `evaluation`, changed by the command line; raise ValueError if the calibration is unusable."""
    if args.calibration is not None:
        evaluation = read_calibration(args.calibration, evaluation)
    names = ("score_threshold", "max_new_tokens", "nms_iou")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.answer is not None:
        changes["answers"] = None if args.answer == "boxes" else AnswersConfig()
    if args.answer == "text":
        changes["max_captions"] = 0
    if args.classes is not None:
        changes["classes"] = args.classes
    return replace(evaluation, **changes)


def prompt_of(args: argparse.Namespace, prompt: PromptConfig) -> PromptConfig:
    """Return the run's prompt, changed by the command line; raise ValueError if a text cannot be asked."""
    if args.prompt is not None:
        prompt = replace(prompt, detect=checked(args.prompt), candidate_phrases=[])
    if args.expression is not None:
        prompt = replace(prompt, candidate_phrases=[checked(text) for text in args.expression])
    return prompt


@dataclass(frozen=True)
class Input:
    """A file to predict."""

    path: Path  # as the command line names it
    name: str  # of its entry and its drawing
    image_id: ImageId  # in COCO results
    truth: Sample | None


@dataclass(frozen=True)
class Predictor:
    """What every batch of images is predicted with."""

    network: JointNetwork  # in evaluation mode, on `device`
    encoder: Encoder
    decoding: Decoding
    dtype: torch.dtype | None  # of `DTYPES`
    device: torch.device
    # Solved examples in order, one more than `num_teachers` if there are: an image is never its own teacher.
    teachers: Sequence[Sample]
    num_teachers: int  # shown before each image
    with_head: bool  # whether the head's objects are wanted
    with_drawings: bool
    batch_size: int
    tile: int | None  # side in pixels of the tiles that are predicted too
    overlap: float  # of tiles


def main(args: argparse.Namespace) -> int:
    """Predict every image that can be read; return the number of those that could not.

    Raises:
        ValueError: Nothing can be predicted (images, checkpoint, teachers or prompt cannot be used, or files would be
            overwritten), or the device's memory or the disk is full.
    """
    out = Path(args.out)
    paths, left_out = find_images(args.images, left_out=out)
    names = unique_names(paths, out)
    inputs = inputs_of(paths, names, args)
    categories = categories_of(args)
    if not args.overwrite:
        refuse_to_overwrite(out, names)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder --out {out}: {error.strerror}") from error
    predictor = build_predictor(args)
    if categories is None and predictor.decoding.classes is not None:
        categories = category_ids(zip(predictor.decoding.classes.names, itertools.count(1), strict=False))
        print(f"{COCO_RESULTS_FILE}: category_id 1 to {len(categories)} are the classes in the order given")
    entries: list[PredictedFile] = []
    try:
        with tqdm(total=len(inputs), unit=" images", disable=None) as progress:
            for start in range(0, len(inputs), args.batch_size):
                part = inputs[start : start + args.batch_size]
                _predict_files(predictor, part, out, entries)
                progress.update(len(part))
    finally:
        if entries:
            write_entries(out, entries, categories)  # whatever ends the run, finished work is kept
    report_categories(entries, categories)
    return report(entries, out, left_out)


def inputs_of(paths: Sequence[Path], names: Sequence[str], args: argparse.Namespace) -> list[Input]:
    """Return the images, with the ids and the truth that COCO instances files give them."""
    ids: Sequence[ImageId] = range(1, len(paths) + 1)
    source = args.image_ids or args.truth
    if source is not None:
        known = read_image_ids(source)
        option = "--truth" if args.image_ids is None else "--image-ids"
        ids = [known[entry] for entry in entries_of(paths, known, f"{option} {source}")]
    truths: Sequence[Sample | None] = [None] * len(paths)
    if args.truth is not None:
        samples = read_coco(args.truth)
        truths = [samples[entry] for entry in entries_of(paths, samples, f"--truth {args.truth}")]
    return [Input(*row) for row in zip(paths, names, ids, truths, strict=True)]


def categories_of(args: argparse.Namespace) -> dict[str, ImageId] | None:
    """Return the category ids by name of --image-ids, else of --truth; None if neither has categories."""
    for path in filter(None, (args.image_ids, args.truth)):
        if categories := category_ids(read_categories(path)):
            return categories
    return None


def report_categories(entries: Sequence[PredictedFile], categories: Mapping[str, ImageId] | None) -> None:
    """Print what the category ids of the COCO results mean."""
    rows = coco_results(entries, categories)
    if categories is None or len(categories) == 1:
        same = 1 if categories is None else next(iter(categories.values()))
        print(f"{COCO_RESULTS_FILE} is class-agnostic: every category_id is {same}; evaluate it with useCats=0")
    elif unnamed := sum(row["category_id"] == NO_CATEGORY for row in rows):
        print(
            f"{COCO_RESULTS_FILE}: {unnamed} of {len(rows)} boxes have category_id {NO_CATEGORY}, as no category is "
            "named like their caption; evaluate with useCats=0 to count them"
        )


def build_predictor(args: argparse.Namespace) -> Predictor:
    """Return the network and the settings; raise ValueError if one of them cannot be used."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":  # as Composer does for the evaluation of a run
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    teachers = [] if args.teachers is None else read_annotated_folder(args.teachers)
    network, processor, config = load_network(args.checkpoint, load_config(args.config) if args.config else None)
    if not network.has_head:
        if args.answer not in (None, "text"):
            raise ValueError(f"{args.checkpoint} was trained with detection_head: null: use --answer text")
        if args.tile is not None:
            raise ValueError(f"{args.checkpoint} was trained with detection_head: null: leave out --tile")
        args.answer = "text"
    prompt = prompt_of(args, config.prompt)
    precision = (view_trainer(config).precision or "amp_fp16").lower()  # Composer's default
    if precision not in DTYPES:
        raise ValueError(f"trainer.precision is {precision!r}: give a --config with one of {', '.join(DTYPES)}")
    evaluation = evaluation_of(args, config.evaluation)
    classes = class_trie(evaluation.classes, processor.tokenizer, network) if network.has_head else None
    num_teachers = args.num_teachers or config.teachers.num_teachers or len(teachers)
    if args.num_teachers is not None and args.num_teachers > len(teachers):
        raise ValueError(f"--num-teachers {num_teachers}: {args.teachers} holds {len(teachers)} annotated images")
    if args.num_teachers is None and num_teachers < len(teachers):
        print(f"each image gets {num_teachers} of {len(teachers)} teachers, as in training: or give --num-teachers N")
    return Predictor(
        network=network.eval().to(device),
        encoder=build_encoder(processor, network, config.image, prompt, config.max_seq_len, keep_image=True),
        decoding=Decoding(processor.tokenizer, evaluation, prompt, classes),
        dtype=DTYPES[precision] if device.type == "cuda" else None,  # Composer ignores it on the CPU
        device=device,
        teachers=teachers[: num_teachers + 1],
        num_teachers=num_teachers,
        with_head=args.answer != "text",
        with_drawings=not args.no_drawings,
        batch_size=args.batch_size,
        tile=args.tile,
        overlap=TILE_OVERLAP if args.overlap is None else args.overlap,
    )


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


def add_tiles(
    example: Example, prediction: Prediction, predictor: Predictor, teachers: Sequence[Sample]
) -> Prediction | str:
    """Return the prediction of an image with what its tiles show, or why one of them has none."""
    size, sample, evaluation = predictor.tile, example.sample, predictor.decoding.evaluation
    tiles = [] if size is None else tiles_of(sample.width, sample.height, size, predictor.overlap)
    if not tiles:
        return prediction
    decoding = replace(predictor.decoding, evaluation=replace(evaluation, answers=None))
    image, found = open_image(sample.image), list[Prediction]()
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


def report(entries: Sequence[PredictedFile], out: Path, left_out: Counter[str]) -> int:
    """Print a summary and every failure; return the number of images that could not be used."""
    predictions = [entry.prediction for entry in entries if entry.prediction is not None]
    num_objects = sum(len(item.objects or item.answer_objects or ()) for item in predictions)
    print(f"{len(predictions)} images, {num_objects} objects: {out / PREDICTIONS_FILE}")
    cut = [entry.file for entry in entries if entry.prediction is not None and entry.prediction.answer_is_cut]
    if cut:
        print(f"{len(cut)} answers were cut off, such as of {cut[0]}: raise --max-new-tokens", file=sys.stderr)
    if left_out:
        kinds = ", ".join(f"{suffix or 'no suffix'} {number}" for suffix, number in sorted(left_out.items()))
        print(f"left out {left_out.total()} files in folders that are not images ({kinds})", file=sys.stderr)
    for entry in entries:
        if entry.error is not None:
            print(f"failed: {entry.file}: {entry.error}", file=sys.stderr)
    return len(entries) - len(predictions)


def _predict_files(predictor: Predictor, inputs: Sequence[Input], out: Path, entries: list[PredictedFile]) -> None:
    """Append one entry per image, in order; then draw the usable ones."""
    examples: list[Example] = []
    shown: dict[str, tuple[Sample | None, list[Sample]]] = {}
    results: dict[str, Prediction | str] = {}
    for item in inputs:
        try:
            data = item.path.read_bytes()
            teachers = [teacher for teacher in predictor.teachers if teacher.image != data][: predictor.num_teachers]
            example = encode_image(data, item.name, predictor.encoder, teachers)
            size, truth = (example.sample.width, example.sample.height), item.truth
            if truth is not None and (truth.width, truth.height) != size:
                raise ValueError(
                    f"it has {size[0]} x {size[1]} pixels, its truth {truth.width} x {truth.height}: "
                    "give --truth of the same images"
                )
            examples.append(example)
            shown[item.name] = truth, teachers
        except OSError as error:
            results[item.name] = f"cannot read the file: {error.strerror}"
        except ValueError as error:
            results[item.name] = str(error)
    threshold, with_head = predictor.decoding.evaluation.score_threshold, predictor.with_head
    found = predict_examples(examples, predictor) if examples else []
    for example, result in zip(examples, found, strict=True):
        name = example.sample.id
        results[name] = result if isinstance(result, str) else add_tiles(example, result, predictor, shown[name][1])
    for item in inputs:
        result = results[item.name]
        if isinstance(result, str):
            entry = PredictedFile(item.name, str(item.path), item.image_id, None, error=result)
        else:
            written = rounded_score(threshold) if with_head else None
            entry = PredictedFile(
                item.name, str(item.path), item.image_id, rounded(result, threshold, with_head), written
            )
            entry = with_objects_below(entry, result, threshold) if with_head else entry
        entries.append(entry)  # before the drawings: if one cannot be written, what was predicted is kept
    for example in examples if predictor.with_drawings else ():
        result = results[example.sample.id]
        if isinstance(result, str):
            continue
        truth, teachers = shown[result.id]
        image = open_image(example.sample.image)
        drawing = draw_prediction(image, result, truth, threshold, teachers, with_head)
        path = out / f"{result.id}.png"
        try:
            drawing.save(path, compress_level=1)  # the default takes longer than the rest of the drawing
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}: give another --out") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through `finally`, as Ctrl-C
    try:
        sys.exit(1 if main(parse(sys.argv[1:])) else 0)
    except ValueError as error:
        sys.exit(redact_text(f"error: {error}"))
