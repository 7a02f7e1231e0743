"""Time matching and losses, forward and backward, next to Hugging Face's Deformable DETR criterion in one run.

    python tests/benchmarks/criterion.py [--repeats N] [--num-layers N] [--baseline TREE_OR_COMMIT]

The peer's criterion has the same costs (2 focal, 5 L1, 2 GIoU) and the same focal objectness with one class, so that
assignments and gradients can be compared. Both are given the same outputs in turn; the medians are compared. Then ours
alone, from 16 to 256 images and from 100 to 900 queries. The last line is JSON: `speedup_over_hf same_assignments
max_grad_diff`, the last relative to the largest entry of the gradient. With `--baseline` the last size is also
measured in an older build, in processes in turns: `large_old_s`, `large_new_s` and `large_old_over_new` are added. All
times are CPU time of one thread.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from build_speed import ROOT, environment, older_build
from recipe.config import LossConfig, MatcherConfig
from recipe.losses.terms import detection_losses
from recipe.models.matcher import match
from recipe.schema import DetectionOutputs, LossCounts, Target

FEWEST, MOST = 5, 60  # objects of an image
LOSS, MATCHER = LossConfig(), MatcherConfig()
SIZES = (
    (16, 100),
    (64, 100),
    (256, 100),
    (16, 300),
    (16, 900),
    (64, 900),
)  # images and queries; the first are compared
COSTS = (MATCHER.cost_bbox, MATCHER.cost_giou, MATCHER.cost_objectness)
WEIGHTS = {"loss_bbox": LOSS.weight_bbox, "loss_giou": LOSS.weight_giou, "loss_objectness": LOSS.weight_objectness}


def random_boxes(*shape: int, generator: torch.Generator) -> Tensor:
    """Return (*shape, 4) cxcywh inside the image."""
    size = torch.rand(*shape, 2, generator=generator) * 0.3 + 0.02
    return torch.cat([size / 2 + torch.rand(*shape, 2, generator=generator) * (1 - size), size], dim=-1)


class Case:
    """Outputs of the decoder layers and targets, the same for both criteria."""

    def __init__(self, num_images: int, num_queries: int, num_layers: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(FEWEST, MOST + 1, (num_images,), generator=generator).tolist()
        self.targets: list[Target | None] = [
            {"boxes": random_boxes(count, generator=generator), "caption_ids": torch.zeros(count, 1, dtype=torch.int64)}
            for count in counts
        ]
        self.num_objects = sum(counts)
        self.boxes = [random_boxes(num_images, num_queries, generator=generator) for _ in range(num_layers)]
        self.logits = [torch.randn(num_images, num_queries, generator=generator) for _ in range(num_layers)]

    def leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return boxes and logits of each layer that take a gradient."""
        boxes, logits = ([part.clone().requires_grad_() for part in parts] for parts in (self.boxes, self.logits))
        return boxes, logits


Pairs = list[list[tuple[int, int, int]]]


def ours(case: Case, boxes: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Tensor, Callable[[], Pairs]]:
    """Return our total loss, and how to read the assignments."""
    layers = [DetectionOutputs(box, logit, box) for box, logit in zip(boxes, logits, strict=True)]
    outputs = layers.pop()
    outputs.aux_outputs = layers
    matches = match([layer for _, layer in outputs.layers()], case.targets, *COSTS)
    # The peer divides objectness by the number of objects too.
    counts = LossCounts(
        teacher_tokens=1, student_tokens=1, objects=case.num_objects, images=case.num_objects, microbatches=1
    )
    terms = detection_losses(outputs, matches, case.targets, counts, LOSS)
    total = torch.stack([WEIGHTS[name.removesuffix("_aux")] * term for name, term in terms.items()]).sum()
    return total, lambda: [
        sorted(zip(m.image.tolist(), m.query.tolist(), m.target.tolist(), strict=True)) for m in matches
    ]


def theirs(case: Case, boxes: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Tensor, Callable[[], Pairs]]:
    """Return Hugging Face's total loss for one class, and how to read the assignments."""
    matcher = DeformableDetrHungarianMatcher(
        class_cost=MATCHER.cost_objectness, bbox_cost=MATCHER.cost_bbox, giou_cost=MATCHER.cost_giou
    )
    criterion = DeformableDetrImageLoss(matcher, 1, LOSS.focal_alpha, ["labels", "boxes", "cardinality"])
    labels = [
        {"class_labels": torch.zeros(len(target["boxes"]), dtype=torch.int64), "boxes": target["boxes"]}
        for target in case.targets
        if target is not None
    ]
    outputs = [{"logits": logit[..., None], "pred_boxes": box} for box, logit in zip(boxes, logits, strict=True)]
    terms = criterion({**outputs[-1], "auxiliary_outputs": outputs[:-1]}, labels)
    weights = {**WEIGHTS, "loss_ce": LOSS.weight_objectness}
    kinds = {name: "_".join(name.split("_")[:2]) for name in terms}
    total = sum(weights[kind] * terms[name] for name, kind in kinds.items() if kind in weights)
    assert isinstance(total, Tensor)

    def pairs() -> Pairs:
        found = [matcher(output, labels) for output in outputs]
        return [
            sorted(
                (i, int(q), int(t))
                for i, (queries, objects) in enumerate(layer)
                for q, t in zip(queries, objects, strict=True)
            )
            for layer in found
        ]

    return total, pairs


def run(criterion: Callable[..., tuple[Tensor, Callable[[], Pairs]]], case: Case) -> tuple[float, Tensor, Pairs]:
    """Return the seconds of a forward and backward pass, the gradient of all boxes and logits, and the assignments."""
    boxes, logits = case.leaves()
    start = time.process_time()
    total, pairs = criterion(case, boxes, logits)
    total.backward()
    seconds = time.process_time() - start
    gradients = [leaf.grad for leaf in [*boxes, *logits] if leaf.grad is not None]
    return seconds, torch.cat([gradient.flatten() for gradient in gradients]), pairs()


# Run in an older build with that build's own version of this script.
MEASURE = """
import time, torch, criterion
torch.set_num_threads(1)
case = criterion.Case({images}, {queries}, {layers})
for _ in range(2):
    boxes, logits = case.leaves()
    start = time.process_time()
    criterion.ours(case, boxes, logits)[0].backward()
    seconds = time.process_time() - start
print(seconds)
"""


def compare_builds(baseline: str, num_layers: int, repeats: int) -> dict[str, float]:
    """Return the CPU seconds of both builds at the largest size, and their ratio."""
    num_images, num_queries = SIZES[-1]
    script = MEASURE.format(images=num_images, queries=num_queries, layers=num_layers)
    seconds: dict[str, list[float]] = {"old": [], "new": []}
    with older_build(baseline) as old:
        for _ in range(repeats):
            for name, tree in (("old", old), ("new", ROOT)):
                own = {**environment(tree), "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests/benchmarks")])}
                command = [sys.executable, "-c", script]
                done = subprocess.run(command, cwd=tree, env=own, check=True, capture_output=True, text=True)
                seconds[name].append(float(done.stdout.splitlines()[-1]))
    old_s, new_s = (median(values) for values in seconds.values())
    return {
        "large_old_s": round(old_s, 3),
        "large_new_s": round(new_s, 3),
        "large_old_over_new": round(old_s / new_s, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare both, then time ours at each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--baseline", help="folder of an older build, or its commit")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    (num_images, num_queries), *_ = SIZES
    case = Case(num_images, num_queries, args.num_layers)
    results = {criterion: [run(criterion, case) for _ in range(3)] for criterion in (ours, theirs)}  # warm-up
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(args.repeats):
        seconds["ours"].append(run(ours, case)[0])
        seconds["theirs"].append(run(theirs, case)[0])
    (_, our_gradient, our_pairs), (_, their_gradient, their_pairs) = results[ours][0], results[theirs][0]
    middle = {name: median(values) for name, values in seconds.items()}
    size = f"{num_images} images, {num_queries} queries, {case.num_objects} objects, {args.num_layers} layers"
    print(f"{size}, forward and backward:")
    print(f"  ours {1e3 * middle['ours']:.1f} ms, Hugging Face {1e3 * middle['theirs']:.1f} ms")
    for num_images, num_queries in SIZES:
        larger = Case(num_images, num_queries, args.num_layers)
        middle_one = median(run(ours, larger)[0] for _ in range(3))
        print(f"  ours, {num_images} images x {num_queries} queries: {1e3 * middle_one:.1f} ms")
    figures = {
        "speedup_over_hf": round(middle["theirs"] / middle["ours"], 2),
        "same_assignments": our_pairs == their_pairs,
        "max_grad_diff": float((our_gradient - their_gradient).abs().max() / their_gradient.abs().max()),
    }
    if args.baseline:
        figures |= compare_builds(args.baseline, args.num_layers, min(args.repeats, 5))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
