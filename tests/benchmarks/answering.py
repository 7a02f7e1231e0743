"""Measure boxes and captions per second of the head, next to the same checkpoint writing its boxes as text.

    python tests/benchmarks/answering.py [--checkpoint CKPT] [--images 64] [--repeats 5]

The first images of the evaluation stream are prompted as `predict.py` does, in batches of 1 and of 8. Both ways answer
from the image's patches to objects with boxes in pixels and captions in words. So what both need, the vision tower and
one pass over the prompt, is inside the time of both. Only decoding the files and cutting them into patches, which is
the same work, is not. The second rates leave that shared pass out.

head   the network's forward pass, then captions for the queries above the run's score threshold. The counted boxes are
       those.
text   greedy generation alone, with its key/value cache, until the last answer of the batch has ended (at most the
       run's `evaluation.max_new_tokens`), then parsing. The counted boxes are those parsed.

The ways take turns, batch by batch, after a pass that is not counted; the median of the passes counts. On the CPU
everything runs on one thread, and its CPU time is taken, which other work on the machine does not lengthen much. F1 at
IoU .5 of both is that of `AnswerBoxes`: of the head's boxes at the run's score threshold. If the ways find unequally
many boxes, boxes per second and images per second have different ratios, so both are printed. The last line is JSON:
`boxes_per_s_head boxes_per_s_text ratio f1_head f1_text` of the batch size with the lesser ratio, and `batch_size`,
`ratio_images`.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import torch
from composer.core import get_precision_context
from composer.devices import Device
from composer.utils import get_device
from torch import nn

from recipe.boxes import answer_frame, text_to_objects
from recipe.config import RecipeConfig
from recipe.configure import load_config
from recipe.data.collate import collate_standard, one_each
from recipe.data.encode import Encoder
from recipe.families import box_coordinates
from recipe.inference.predictor import encode_image
from recipe.joint import JointModel
from recipe.load import build_encoder, load_network
from recipe.metrics.boxes import answer_boxes
from recipe.metrics.calibration import calibration
from recipe.prediction.decode import Decoding, generate_answers, predict
from recipe.schema import Batch, Prediction, Sample
from recipe.upstream.storage import CheckedDataset, open_streams

CHECKPOINT = "quickstart/run/checkpoints/latest-rank0.pt"
BATCH_SIZES = (1, 8)

Way = Callable[[JointModel, Batch, RecipeConfig], list[Prediction]]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="a .pt file of a run, or an exported folder")
    parser.add_argument("--config", help="default: what was saved with the checkpoint")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def read_samples(config: RecipeConfig, count: int) -> list[Sample]:
    """Return the first samples of the evaluation stream that have an image and annotations."""
    rows: Any = CheckedDataset(streams=open_streams(config.eval_loader.streams), batch_size=1)
    found: list[Sample] = []
    for index in range(rows.num_samples):
        sample = Sample.from_mds(rows[index])
        if sample.has_image and sample.objects is not None:
            found.append(sample)
        if len(found) == count:
            break
    return found


def make_batches(samples: Sequence[Sample], batch_size: int, encoder: Encoder, device: Device) -> list[Batch]:
    """Return batches of prompts alone: the truth is in none of them."""
    examples = [encode_image(sample.image, sample.id, encoder) for sample in samples]
    starts = range(0, len(examples), batch_size)
    collated = [
        collate_standard(one_each(examples[start : start + batch_size]), encoder.pad_token_id) for start in starts
    ]
    return [device.batch_to_device(batch) for batch in collated]


def by_head(model: JointModel, batch: Batch, config: RecipeConfig) -> list[Prediction]:
    """Return the objects above the run's score threshold."""
    evaluation = replace(config.evaluation, answers=None)
    _, predictions = predict(model.model, batch, Decoding(model.tokenizer, evaluation, config.prompt))
    return [
        replace(prediction, answer="", answer_objects=above(prediction, evaluation.score_threshold))
        for prediction in predictions
    ]


def above(prediction: Prediction, threshold: float) -> tuple[Any, ...]:
    """Return the head's objects with such a score."""
    return tuple(item for item in prediction.objects if item.score >= threshold)


def by_text(model: JointModel, batch: Batch, config: RecipeConfig) -> list[Prediction]:
    """Return the objects that the language model's answer names."""
    vlm = model.model.vlm
    tokens = batch["input_ids"].flatten()
    prompts = [tokens[row[row >= 0]] for row in batch["prompt_index"]]
    most = config.evaluation.max_new_tokens
    written = generate_answers(vlm, model.tokenizer, prompts, batch["pixel_patches"], batch["image_grid_thw"], most)
    patch = vlm.hf_model.config.vision_config.patch_size
    predictions = []
    for sample, ids, grid in zip(batch["samples"], written, batch["image_grid_thw"].tolist(), strict=True):
        answer = model.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()
        frame = answer_frame(box_coordinates(config.prompt, vlm.hf_model.config), (grid[2] * patch, grid[1] * patch))
        objects = text_to_objects(answer, (sample.width, sample.height), frame)
        told = None if objects is None else tuple(objects)
        predictions.append(Prediction(sample.id, sample.width, sample.height, (), answer, told))
    return predictions


class Stopwatch:
    """Seconds of a module's first forward pass."""

    def __init__(self, module: nn.Module):
        self.seconds = 0.0
        self._module = module
        self._start = 0.0
        self._is_first = True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the first forward pass while one batch is answered."""
        self._is_first = True
        hooks = [
            self._module.register_forward_pre_hook(lambda *_: self._begin()),
            self._module.register_forward_hook(lambda *_: self._end()),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self) -> None:
        self._start = now()

    def _end(self) -> None:
        self.seconds += now() - self._start if self._is_first else 0.0
        self._is_first = False


def now() -> float:
    """Return seconds: of a GPU's clock, when it has done all work; else of this process's CPU time."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Timing:
    """Seconds of one pass over all images, those of the shared pass in it, and what was answered."""

    seconds: float = 0.0
    shared: float = 0.0
    predictions: list[Prediction] = field(default_factory=list[Prediction])


def answer(timing: Timing, way: Way, shared: nn.Module, model: JointModel, batch: Batch, config: RecipeConfig) -> None:
    """Answer one batch; `shared` is the module whose first forward pass is what both ways need."""
    watch, start = Stopwatch(shared), now()
    with torch.inference_mode(), get_precision_context(config.trainer.get("precision") or "fp32"), watch.running():
        timing.predictions += way(model, batch, config)
    timing.seconds += now() - start
    timing.shared += watch.seconds


@dataclass(frozen=True)
class Row:
    """Of one way and batch size: boxes, boxes per second with and without the shared pass, images per second, F1."""

    way: str
    boxes: int
    rate: float
    own_rate: float
    images_rate: float
    f1: float


def row_of(way: str, timings: Sequence[Timing], samples: Sequence[Sample]) -> Row:
    """Return the median of the repeats, all of which answer the same."""
    predictions = timings[0].predictions
    assert all(timing.predictions == predictions for timing in timings)
    boxes = sum(len(prediction.answer_objects or ()) for prediction in predictions)
    seconds = median(timing.seconds for timing in timings)
    own = median(timing.seconds - timing.shared for timing in timings)
    return Row(
        way, boxes, boxes / seconds, boxes / own, len(samples) / seconds, answer_boxes(predictions, samples)["text_f1"]
    )


def measure(
    model: JointModel, samples: Sequence[Sample], batches: Sequence[Batch], config: RecipeConfig, repeats: int
) -> tuple[Row, Row, list[Prediction]]:
    """Measure head and text in turns; return both, and what the head answered."""
    hf_model: Any = model.model.vlm.hf_model
    ways: dict[str, tuple[Way, nn.Module]] = {"head": (by_head, model.model.vlm), "text": (by_text, hf_model.model)}
    passes: list[dict[str, Timing]] = []
    for _ in range(repeats + 1):
        passes.append({name: Timing() for name in ways})
        for batch in batches:
            for name, (way, shared) in ways.items():
                answer(passes[-1][name], way, shared, model, batch, config)
    timings = {name: [timing[name] for timing in passes[1:]] for name in ways}  # the first pass warms up
    head, text = (row_of(name, timings[name], samples) for name in ways)
    return head, text, timings["head"][0].predictions


def report_of(head: Row, text: Row, batch_size: int) -> dict[str, float | None]:
    """Print the table's rows and return the figures of the JSON line: no ratio if the text has no boxes."""
    for row in (head, text):
        numbers = f"{row.boxes} | {row.rate:.1f} | {row.own_rate:.1f} | {row.images_rate:.1f} | {row.f1:.3f}"
        print(f"| {batch_size} | {row.way} | {numbers} |")
    ratio = None
    if text.boxes:
        ratio = round(head.rate / text.rate, 2)
        own, images = head.own_rate / text.own_rate, head.images_rate / text.images_rate
        print(f"| {batch_size} | ratio | | {ratio:.1f} | {own:.1f} | {images:.1f} | |", flush=True)
    return {
        "boxes_per_s_head": round(head.rate, 2),
        "boxes_per_s_text": round(text.rate, 2),
        "ratio": ratio,
        "f1_head": round(head.f1, 4),
        "f1_text": round(text.f1, 4),
        "batch_size": batch_size,
        "ratio_images": round(head.images_rate / text.images_rate, 2),
    }


def report_best(predictions: Sequence[Prediction], samples: Sequence[Sample], threshold: float) -> None:
    """Print what the head could reach at another threshold."""
    scores = calibration(predictions, samples)
    print(
        f"score threshold of the run {threshold:g}; the best for these images would be "
        f"{scores['best_score_threshold']:.3f}, with F1 {scores['best_f1']:.3f}"
    )


def main() -> None:
    """Measure and report."""
    args = parse()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    network, processor, config = load_network(args.checkpoint, load_config(args.config) if args.config else None)
    model = JointModel(network, processor.tokenizer, config.loss, config.evaluation, config.prompt)
    device = get_device()
    model = device.module_to_device(model.eval())
    samples = read_samples(config, args.images)
    encoder = build_encoder(processor, model.model, config.image, config.prompt, config.max_seq_len)
    truths = sum(not item.iscrowd for sample in samples for item in sample.objects or ())
    print(f"{Path(args.checkpoint).name}: {len(samples)} images with {truths} objects")
    print("| batch | way | boxes | boxes/s | without the shared pass | images/s | F1@0.5 |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    reports, predictions = [], []
    for batch_size in BATCH_SIZES:
        batches = make_batches(samples, batch_size, encoder, device)
        head, text, predictions = measure(model, samples, batches, config, args.repeats)
        reports.append(report_of(head, text, batch_size))
    report_best(predictions, samples, config.evaluation.score_threshold)
    print(json.dumps(min(reports, key=lambda report: report["ratio"] or inf)))


if __name__ == "__main__":
    main()
