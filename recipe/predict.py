"""Predict: `python recipe/predict.py --checkpoint CKPT --out DIR IMAGE [IMAGE ...]`; IMAGE may be a folder or a glob.

`composer -n N recipe/predict.py ...` shares the images over N processes. With several, or with --part-images, the same
command continues where it was killed: see `recipe/prediction/parts.py`.

Writes DIR/predictions.json (see `recipe/prediction/files.py`), DIR/coco_results.json and one drawing per image. If an
image cannot be used, the JSON and the terminal say why, the others are still predicted, and the exit status is 1. If
the command is stopped or fails, both files keep what was done. `python -m recipe.gallery` makes a page of DIR.
"""

import sys

from recipe.configure import one_line_errors
from recipe.console import setup_logging
from recipe.prediction.options import parse

if __name__ == "__main__":
    setup_logging()
    with one_line_errors():
        parse(sys.argv[1:])  # before the imports below, which take seconds

import argparse
import itertools
import signal
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from convert.annotated import read_categories, read_coco, read_image_ids
from recipe.images import open_image
from recipe.inference.predictor import Predictor, Request, encode_image, predict_images
from recipe.inference.predictor import build_predictor as build
from recipe.prediction.draw import draw_prediction
from recipe.prediction.files import (
    COCO_RESULTS_FILE,
    NO_CATEGORY,
    PREDICTIONS_FILE,
    AnyPath,
    PredictedFile,
    category_ids,
    coco_results,
    entries_of,
    find_images,
    refuse_to_overwrite,
    rounded,
    rounded_score,
    unique_names,
    with_objects_below,
    write_entries,
)
from recipe.prediction.parts import (
    BATCHES_PER_PART,
    PARTS_FOLDER,
    Parts,
    batches_of,
    identity_of,
    open_parts,
    place_in_world,
)
from recipe.redact import redact_text
from recipe.schema import Example, ImageId, Prediction, Sample

READERS = 8  # threads that read files ahead


@dataclass(frozen=True)
class Input:
    """A file to predict."""

    path: AnyPath  # as the command line names it
    name: str  # of its entry and its drawing
    image_id: ImageId  # in COCO results
    truth: Sample | None


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
    rank, local_rank, world_size = place_in_world()
    is_unfinished = (out / PARTS_FOLDER).exists()  # then what is there is of its finished parts
    in_parts = world_size > 1 or args.part_images is not None or is_unfinished
    if not (args.overwrite or is_unfinished):
        refuse_to_overwrite(out, names)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder --out {out}: {error.strerror}") from error
    parts = None
    if in_parts:
        size = args.part_images or BATCHES_PER_PART * args.batch_size
        asked = depends_on(args)
        parts = open_parts(out, asked, [str(path) for path in paths], size, args.overwrite, rank, world_size)
    device = f"cuda:{local_rank}" if world_size > 1 and torch.cuda.is_available() else None
    predictor = build_predictor(args, device)
    if categories is None and predictor.decoding.classes is not None:
        categories = category_ids(zip(predictor.decoding.classes.names, itertools.count(1), strict=False))
        if rank == 0:
            print(f"{COCO_RESULTS_FILE}: category_id 1 to {len(categories)} are the classes in the order given")
    entries: list[PredictedFile] = []
    if parts is None:
        try:
            predict_inputs(predictor, inputs, [slice(0, len(inputs))], out, entries, args)
        finally:
            if entries:
                write_entries(out, entries, categories)  # whatever ends the run, finished work is kept
    else:
        predict_inputs(predictor, inputs, parts.to_do(), out, entries, args, parts)
        if rank:
            return 0  # the first process reports
        entries = parts.read_all()
        write_entries(out, entries, categories)
        parts.remove()
    report_categories(entries, categories)
    return report(entries, out, left_out)


def depends_on(args: argparse.Namespace) -> dict[str, str]:
    """Return all of a command line that its results depend on, but the images."""
    elsewhere = ("images", "out", "overwrite", "part_images", "checkpoint")
    asked = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items() if name not in elsewhere}
    return {"--checkpoint": identity_of(args.checkpoint), **asked}


def predict_inputs(
    predictor: Predictor,
    inputs: Sequence[Input],
    pieces: Sequence[slice],
    out: Path,
    entries: list[PredictedFile],
    args: argparse.Namespace,
    parts: Parts | None = None,
) -> None:
    """Predict pieces of the inputs batch by batch: append to `entries`, or write each piece into `parts`."""
    batches = [batch for piece in pieces for batch in batches_of(piece, args.batch_size, len(inputs))]
    last = {min(piece.stop, len(inputs)): piece for piece in pieces}  # by where it ends
    quiet = True if place_in_world()[0] else None  # None: where there is a terminal
    with tqdm(total=sum(batch.stop - batch.start for batch in batches), unit=" images", disable=quiet) as progress:
        for batch, files in read_ahead(inputs, batches):
            _predict_files(predictor, inputs[batch], files, out, entries, with_drawings=not args.no_drawings)
            progress.update(batch.stop - batch.start)
            if parts is not None and batch.stop in last:
                parts.write(last[batch.stop], entries)
                entries.clear()


def read_ahead(inputs: Sequence[Input], batches: Sequence[slice]) -> Iterator[tuple[slice, list[Future[bytes]]]]:
    """Yield each batch with its files, which are read while the batch before is predicted."""
    waiting = deque[tuple[slice, list[Future[bytes]]]]()
    with ThreadPoolExecutor(READERS) as readers:
        for batch in batches:
            waiting.append((batch, [readers.submit(item.path.read_bytes) for item in inputs[batch]]))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting


def inputs_of(paths: Sequence[AnyPath], names: Sequence[str], args: argparse.Namespace) -> list[Input]:
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


def build_predictor(args: argparse.Namespace, device: str | None = None) -> Predictor:
    """Return what a command line asks; raise ValueError if a part of it cannot be used."""
    predictor = build(
        args.checkpoint,
        request_of(args),
        config=args.config,
        calibration=args.calibration,
        teachers=args.teachers,
        num_teachers=args.num_teachers,
        device=device,
        batch_size=args.batch_size,
    )
    return predictor.tiled(args.tile, args.overlap)


def request_of(args: argparse.Namespace) -> Request:
    """Return what a command line asks of the model."""
    return Request(
        answer=args.answer,
        prompt=args.prompt,
        expressions=args.expression,
        classes=args.classes,
        score_threshold=args.score_threshold,
        nms_iou=args.nms_iou,
        max_new_tokens=args.max_new_tokens,
    )


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


def _predict_files(
    predictor: Predictor,
    inputs: Sequence[Input],
    files: Sequence[Future[bytes]],
    out: Path,
    entries: list[PredictedFile],
    with_drawings: bool,
) -> None:
    """Append one entry per image, in order; then draw the usable ones."""
    examples: list[Example] = []
    truths: dict[str, Sample | None] = {}
    results: dict[str, Prediction | str] = {}
    for item, file in zip(inputs, files, strict=True):
        try:
            data = file.result()
            example = encode_image(data, item.name, predictor.encoder, predictor.teachers_of(data))
            size, truth = (example.sample.width, example.sample.height), item.truth
            if truth is not None and (truth.width, truth.height) != size:
                raise ValueError(
                    f"it has {size[0]} x {size[1]} pixels, its truth {truth.width} x {truth.height}: "
                    "give --truth of the same images"
                )
            examples.append(example)
            truths[item.name] = truth
        except OSError as error:
            results[item.name] = f"cannot read the file: {error.strerror}"
        except ValueError as error:
            results[item.name] = str(error)
    threshold, with_head = predictor.decoding.evaluation.score_threshold, predictor.with_head
    names = [example.sample.id for example in examples]
    results |= zip(names, predict_images(examples, predictor), strict=True)
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
    for example in examples if with_drawings else ():
        result = results[example.sample.id]
        if isinstance(result, str):
            continue
        image, teachers = open_image(example.sample.image), predictor.teachers_of(example.sample.image)
        drawing = draw_prediction(image, result, truths[result.id], threshold, teachers, with_head)
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
