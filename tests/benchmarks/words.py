"""Measure how well a short joint run on one thread learns the quickstart's words: a fast way to compare keys.

    python tests/benchmarks/words.py [--seconds 240] [--steps N] [key.sub=value ...]

It needs the data of `make quickstart`. It trains with yamls/quickstart.yaml and the given keys, without Composer, for
that many CPU seconds or `--steps`, whichever ends first; the cosine ends there too. Then it evaluates 400 scenes that
no split of the quickstart holds. It prints mean training losses every 100 steps. The last line is JSON: scores, losses,
and the shares of found boxes with a wrong size, colour and shape.
"""

import argparse
import io
import json
import math
import time
from collections import Counter, defaultdict
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from composer.utils import dist, get_device, reproducibility

from quickstart import FOLDER, ROOT, YAML, run
from recipe.build import build_model, caption_length
from recipe.configure import load_config
from recipe.data.loader import build_eval_loader, build_train_loader
from recipe.data.stream import read_teachers
from recipe.joint import JointModel, all_scores
from recipe.load import build_encoder, load_processor
from recipe.losses.counts import UNIT_COUNTS, count_losses, split_batch
from recipe.metrics.boxes import answer_boxes
from recipe.metrics.captions import match_captions
from recipe.metrics.scorers import default_text_scorer
from recipe.optim.groups import build_optimizer
from recipe.prediction.decode import Decoding, evaluated, predict

SCENES = (400, 5)  # evaluated, and their seed
NUM_ANSWERED = 160
WARM_UP, LAST = 1 / 30, 0.02  # of the run, of the rates
WORDS = ("size", "colour", "shape")  # of a caption, in order


def rate_factor(done: float) -> float:
    """Return the factor on all rates when a share of the run is done: warm-up, then a cosine."""
    if done < WARM_UP:
        return done / WARM_UP
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def train(model: JointModel, loader: Any, config: Any, steps: float, seconds: float) -> tuple[int, float]:
    """Train on whole batches; return the steps taken and their CPU seconds."""
    optimizer = build_optimizer(model, config.optimizer)
    groups = [(group, group["lr"]) for group in optimizer.param_groups]
    weights = [weight for group, _ in groups for weight in group["params"]]
    sums: defaultdict[str, float] = defaultdict(float)
    start, step, size = time.process_time(), 0, config.train_loader.global_batch_size
    model.train()
    while True:
        for batches in loader.dataloader:
            passed = time.process_time() - start
            done = max(step / steps, passed / seconds)
            if done >= 1:
                return step, passed
            for group, rate in groups:
                group["lr"] = rate * rate_factor(done)
            (batch,) = loader.split_batch(batches, size)
            losses = model.loss(model(batch), batch)
            losses["total"].backward()
            torch.nn.utils.clip_grad_norm_(weights, config.optimizer.clip_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            for name, loss in losses.items():
                sums[name] += loss.item()
            if step % 100 == 0:
                print(
                    step, f"{passed:.0f} s", {name: round(total / 100, 3) for name, total in sums.items()}, flush=True
                )
                sums.clear()


def evaluate(model: JointModel, loader: Any, config: Any) -> dict[str, Any]:
    """Return scores, losses and the shares of wrong words."""
    samples, predictions, answered = [], [], 0
    sums, counts, found, wrong = Counter[str](), Counter[str](), 0, Counter[str]()
    model.eval()
    for batch in (batch for batches in loader.dataloader for batch in batches):
        evaluation = replace(config.evaluation, score_threshold=0.0)
        if len(samples) >= NUM_ANSWERED:
            evaluation = replace(evaluation, answers=None)
        made, found_here = predict(model.model, batch, Decoding(model.tokenizer, evaluation, config.prompt))
        with torch.no_grad():
            sums.update({name: float(term) for name, term in model.loss_terms(made, batch, UNIT_COUNTS).items()})
        counts.update(count_losses(batch))  # pyright: ignore[reportArgumentType] - all are numbers
        samples += [sample for sample, _, _ in evaluated(batch)]
        predictions += found_here
        answered = len(samples) if evaluation.answers is not None else answered
    threshold = config.evaluation.score_threshold
    for prediction, sample in zip(predictions, samples, strict=True):
        for caption, truth in match_captions(prediction, sample.objects, threshold):
            words, wanted = caption.split(), truth.split()
            found += 1
            wrong.update(
                name for name, *pair in zip(WORDS, words + [""] * 3, wanted, strict=False) if len(set(pair)) > 1
            )
    scores = all_scores(
        predictions, samples, config.detection_head.num_queries, threshold, default_text_scorer(), False
    )
    if config.evaluation.answers is not None:
        scores |= answer_boxes(predictions[:answered], samples[:answered])
    names = ("box_ap50", "box_ap", "caption_match", "recall", "text_f1", "text_miou")
    units = {"loss_lm_student": "student_tokens", "loss_caption": "images", "loss_giou": "objects"}
    return {
        **{name: round(scores[name], 4) for name in names if name in scores},
        **{name: round(sums[name] / max(1, counts[unit]), 4) for name, unit in units.items()},
        **{f"wrong_{name}": round(wrong[name] / max(1, found), 3) for name in WORDS},
    }


def main() -> None:
    """Train, evaluate and report."""
    parser = argparse.ArgumentParser(description="Measure how well a short joint run learns the quickstart's words.")
    parser.add_argument("--seconds", type=float, default=240.0, help="CPU seconds of training at most")
    parser.add_argument("--steps", type=float, default=math.inf, help="at most")
    parser.add_argument("keys", nargs="*", metavar="key.sub=value")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = str(FOLDER / "data")
    if not (ROOT / data / "train").is_dir():
        parser.error(f"{data} does not exist: run `make quickstart` once")
    if not (ROOT / data / "words").is_dir():
        scenes = f"--num-samples {SCENES[0]} --seed {SCENES[1]} --image-size 112 --max-objects 3".split()
        with redirect_stdout(io.StringIO()):
            run("python", "-m", "convert.shapes", "--out", data, "--split", "words", *scenes)
    keys = ["eval_loader.streams.shapes.split=words", *args.keys]
    config = load_config(str(ROOT / YAML), keys)
    dist.initialize_dist(get_device(), 300)
    reproducibility.seed_all(config.seed)
    processor, size = load_processor(config.model.pretrained_model_name_or_path), config.train_loader.global_batch_size
    teachers = read_teachers(config.teachers, config.seed)
    model = build_model(config, processor, caption_length(config, processor.tokenizer))
    asked = (processor, model.model, config.image, config.prompt, config.max_seq_len)
    loader = build_train_loader(
        config.train_loader, build_encoder(*asked), teachers, config.seed, size, split_batch, config.val_fraction
    )
    steps, seconds = train(model, loader, config, args.steps, args.seconds)
    scenes = build_eval_loader(config.eval_loader, build_encoder(*asked, keep_image=True), teachers, config.seed)
    result = evaluate(model, scenes, config)
    print(json.dumps({"steps": steps, "cpu_seconds": round(seconds), **result}))


if __name__ == "__main__":
    main()
