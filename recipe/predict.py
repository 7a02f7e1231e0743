"""Predict: `python recipe/predict.py --checkpoint CKPT --out DIR IMAGE [IMAGE ...]`.

Writes DIR/predictions.json, with boxes in pixels of the displayed picture, and one drawn PNG a picture. A picture that
cannot be used has its reason in the JSON and on the terminal, the others are still done, and the exit status is 1.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer.core import get_precision_context
from composer.devices import Device, DeviceGPU
from composer.utils import get_device
from tqdm import tqdm

from recipe.build import build_encoder
from recipe.checkpoint import load_model
from recipe.config import EvaluationConfig, RecipeConfig
from recipe.config_file import load_config
from recipe.data.collate import collate_standard
from recipe.data.encode import Encoder
from recipe.draw import draw_prediction
from recipe.inference import predict_batch
from recipe.joint import JointModel
from recipe.logging_setup import setup_logging
from recipe.pictures import displayed_size, open_image
from recipe.redact import redact_text
from recipe.schema import DetectedObject, Example, Prediction, Sample

PREDICTIONS_FILE = "predictions.json"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Find and describe the objects of pictures.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a picture file")
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="a .pt file, or a folder from export.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of predictions.json and the drawings")
    parser.add_argument("--config", metavar="YAML", help="default: what was saved with the checkpoint")
    parser.add_argument("--score-threshold", type=float, metavar="F", help="least score; default: the run's")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at once; default %(default)s")
    parser.add_argument("--no-answer", action="store_true", help="skip the language model's own answer")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer; default: the run's")
    args = parser.parse_args(arguments)
    if args.score_threshold is not None and not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold {args.score_threshold}: must be between 0 and 1")
    for name in ("batch_size", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    return args


def main(args: argparse.Namespace) -> int:
    """Predicts every picture that can be read; the number of those that could not.

    Raises:
        ValueError: The checkpoint cannot be loaded.
    """
    device = get_device()
    model, processor, config = load_model(args.checkpoint, load_config(args.config) if args.config else None)
    config = replace(config, evaluation=evaluation_of(args, config.evaluation))
    model = device.module_to_device(model.eval())
    encoder = build_encoder(config, processor, keep_image=True)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [Path(image) for image in args.images]
    names = unique_names(paths, out)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(paths), unit=" pictures", disable=None) as progress:
        for start in range(0, len(paths), args.batch_size):
            part = slice(start, start + args.batch_size)
            rows += _predict_files(paths[part], names[part], out, model, encoder, config, device)
            progress.update(len(paths[part]))
    (out / PREDICTIONS_FILE).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report(rows, out)


def evaluation_of(args: argparse.Namespace, evaluation: EvaluationConfig) -> EvaluationConfig:
    """The run's way to predict, with what the command line says otherwise."""
    changes: dict[str, Any] = {
        name: value for name in ("score_threshold", "max_new_tokens") if (value := getattr(args, name)) is not None
    }
    if args.no_answer:
        changes["generate_answer"] = False
    return replace(evaluation, **changes)


def unique_names(paths: Sequence[Path], out: Path) -> list[str]:
    """A name a picture, its stem where that is free; no drawing `{out}/{name}.png` overwrites another or an input."""
    taken = {str(path.resolve()).casefold() for path in paths}
    names = []
    for path in paths:
        name, number = path.stem, 1
        while (drawing := str((out / f"{name}.png").resolve()).casefold()) in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(drawing)
        names.append(name)
    return names


def encode_picture(path: Path, name: str, encoder: Encoder) -> Example:
    """The prompt about one picture.

    Raises:
        ValueError: The file is missing, or no picture, or the model cannot take it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the file: {error.strerror}") from error
    width, height = displayed_size(data)
    return encoder(Sample(name, data, width, height, objects=None))


def predict_examples(
    examples: Sequence[Example], model: JointModel, encoder: Encoder, config: RecipeConfig, device: Device
) -> list[Prediction]:
    """One prediction an example, in the precision that the run was evaluated in."""
    precision = config.trainer.get("precision") or ("amp_fp16" if isinstance(device, DeviceGPU) else "fp32")
    batch = device.batch_to_device(collate_standard(examples, encoder.pad_token_id))
    with torch.inference_mode(), get_precision_context(precision):
        outputs = model(batch)
        return predict_batch(
            model.model,
            batch,
            outputs.detection,
            outputs.memory,
            encoder.tokenizer,
            config.evaluation,
            config.prompt,
        )


def prediction_row(name: str, path: Path, prediction: Prediction, score_threshold: float) -> dict[str, Any]:
    """One entry of predictions.json: objects by falling score, none below the threshold."""
    answer = prediction.answer_objects
    return {
        "id": name,
        "file": str(path),
        "width": prediction.width,
        "height": prediction.height,
        "objects": [_object_row(item, True) for item in prediction.objects if item.score >= score_threshold],
        "answer": prediction.answer,
        "answer_objects": None if answer is None else [_object_row(item, False) for item in answer],
        "error": None,
    }


def failed_row(name: str, path: Path, error: ValueError) -> dict[str, Any]:
    """The entry of a picture of which nothing is known."""
    unknown = dict.fromkeys(("width", "height", "objects", "answer", "answer_objects"))
    return {"id": name, "file": str(path), **unknown, "error": str(error)}


def report(rows: Sequence[dict[str, Any]], out: Path) -> int:
    """Prints what was done; the number of pictures that could not be."""
    failed = [row for row in rows if row["error"] is not None]
    num_objects = sum(len(row["objects"]) for row in rows if row["error"] is None)
    print(f"{len(rows) - len(failed)} pictures, {num_objects} objects: {out / PREDICTIONS_FILE} and a drawing of each")
    for row in failed:
        print(f"failed: {row['file']}: {row['error']}", file=sys.stderr)
    return len(failed)


def _predict_files(
    paths: Sequence[Path],
    names: Sequence[str],
    out: Path,
    model: JointModel,
    encoder: Encoder,
    config: RecipeConfig,
    device: Device,
) -> list[dict[str, Any]]:
    """One row a picture, in order; draws those that could be read."""
    examples: list[Example] = []
    failures: dict[str, ValueError] = {}
    for path, name in zip(paths, names, strict=True):
        try:
            examples.append(encode_picture(path, name, encoder))
        except ValueError as error:
            failures[name] = error
    threshold = config.evaluation.score_threshold
    predictions = predict_examples(examples, model, encoder, config, device) if examples else []
    for example, prediction in zip(examples, predictions, strict=True):
        picture = open_image(example.sample.image)
        drawing = draw_prediction(picture, prediction, score_threshold=threshold)
        drawing.save(out / f"{prediction.id}.png")
    found = {prediction.id: prediction for prediction in predictions}
    return [
        prediction_row(name, path, found[name], threshold) if name in found else failed_row(name, path, failures[name])
        for path, name in zip(paths, names, strict=True)
    ]


def _object_row(item: DetectedObject, with_score: bool) -> dict[str, Any]:
    score = {"score": round(item.score, 4)} if with_score else {}
    return {"box": [round(value, 2) for value in item.box], **score, "caption": item.caption}


if __name__ == "__main__":
    setup_logging()
    try:
        sys.exit(1 if main(parse(sys.argv[1:])) else 0)
    except ValueError as error:
        sys.exit(redact_text(f"error: {error}"))
