"""The command line of `recipe/predict.py`, and what it changes in a run's configuration."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipe.calibrate import read_calibration
from recipe.config import EvaluationConfig, PromptConfig
from recipe.data.chat import checked


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Find and describe the objects of pictures.")
    parser.add_argument("images", nargs="+", metavar="PICTURE", help="a file, a folder to search, or a quoted glob")
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="a .pt file, or a folder from export.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of predictions.json and the drawings")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in DIR")
    parser.add_argument("--no-drawings", action="store_true", help="write the JSON files alone")
    parser.add_argument("--config", metavar="YAML", help="default: what was saved with the checkpoint")
    parser.add_argument(
        "--answer",
        choices=("text", "boxes", "both"),
        help="text: the language model's, boxes: the head's; default: the run's",
    )
    parser.add_argument("--score-threshold", type=float, metavar="F", help="least score; default: the run's")
    parser.add_argument(
        "--calibration", type=Path, metavar="YAML", help="from eval.py: calibrated scores and their threshold"
    )
    parser.add_argument("--nms-iou", type=float, metavar="F", help="of two boxes that overlap more, one goes")
    parser.add_argument("--num-beams", type=int, metavar="N", help="beam search of captions; default: the run's")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at once; default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer; default: the run's")
    parser.add_argument("--prompt", metavar="TEXT", help="asked instead of the run's prompt and candidate phrases")
    parser.add_argument(
        "--expression", action="append", metavar="TEXT", help="look for this (candidate phrase); repeatable"
    )
    parser.add_argument(
        "--teachers",
        type=Path,
        metavar="FOLDER",
        help="solved examples: MDS shards, or a .jsonl and pictures",
    )
    parser.add_argument(
        "--num-teachers",
        type=int,
        metavar="N",
        help="first N of FOLDER; default: as in training, else all",
    )
    parser.add_argument("--truth", type=Path, metavar="JSON", help="COCO instances file: draw the truth beside")
    parser.add_argument(
        "--image-ids", type=Path, metavar="JSON", help="COCO instances file with their ids; default: 1, 2, ..."
    )
    args = parser.parse_args(arguments)
    if args.score_threshold is not None and not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold {args.score_threshold}: must be between 0 and 1")
    if args.nms_iou is not None and not 0 < args.nms_iou < 1:
        parser.error(f"--nms-iou {args.nms_iou}: must be between 0 and 1")
    for name, texts in (("prompt", [args.prompt]), ("expression", args.expression or [])):
        if any(text is not None and not text.strip() for text in texts):
            parser.error(f"--{name}: asks nothing; give a text, or leave it out for the run's prompt")
    for name in ("batch_size", "max_new_tokens", "num_teachers", "num_beams"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if args.num_teachers is not None and args.teachers is None:
        parser.error("--num-teachers needs --teachers FOLDER")
    return args


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
