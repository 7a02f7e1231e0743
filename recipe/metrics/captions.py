"""Score captions: of matched boxes (equal, METEOR, CIDEr-D), and by dense-captioning mAP.

- Dense-captioning mAP: Johnson, Karpathy and Fei-Fei, "DenseCap", 2016, section 4.2.
- CIDEr-D: Vedantam, Zitnick and Parikh, 2015: rare words count more.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from recipe.metrics.gather import (
    UNDEFINED,
    boxes_of,
    found_truths,
    is_unsure,
    normalized_caption,
    scored_pairs,
    split_crowds,
)
from recipe.metrics.scorers import TextScorer, words_of
from recipe.schema import DetectedObject, Object, Prediction, Sample


def captions_read(found: Sequence[DetectedObject], sample: Sample, score_threshold: float) -> set[int]:
    """Return the positions of the objects whose captions the scores of this file and of boxes read.

    Those of `match_captions`, and of each merged truth the first object assigned to it (`dense_captioning`). If the
    image was not searched for everything, of all: their captions decide which are ignored. Scores by category read
    more. `found` is by falling score, whatever the captions.
    """
    if sample.objects is None or not sample.has_image:
        return set()
    if sample.searched is not None:
        return set(range(len(found)))
    kept = [item for item in found if item.score >= score_threshold]
    matched = {place for place, truth in enumerate(found_truths(kept, sample.objects, 0.5)) if truth >= 0}
    return matched | set(_assigned(found, sample, sample.objects).read)


def match_captions(
    prediction: Prediction, objects: Sequence[Object], score_threshold: float, iou_threshold: float = 0.5
) -> list[tuple[str, str]]:
    """Return (predicted, true) captions of matched boxes.

    Predictions with at least `score_threshold` are matched by falling score, each to the free ground truth that it
    overlaps most, at an IoU of at least `iou_threshold`. Crowd regions are ignored.
    """
    kept = [item for item in prediction.objects if item.score >= score_threshold]
    kept.sort(key=lambda item: -item.score)
    places = found_truths(kept, objects, iou_threshold)
    return [(item.caption, objects[place].caption) for item, place in zip(kept, places, strict=True) if place >= 0]


def caption_match(
    predictions: Sequence[Prediction], samples: Sequence[Sample], score_threshold: float, scorer: TextScorer
) -> dict[str, float]:
    """Compare the captions of matched boxes (`match_captions`).

    Returns:
        `caption_match`: share of pairs with equal captions, without case and outer blanks.
        `caption_{scorer.name}`: mean score of the pairs.
        `caption_cider_d`: mean CIDEr-D of the pairs. Document frequencies are those of all ground-truth captions,
            matched or not, so the scale does not depend on what a model finds. Captions of fewer than four words cannot
            reach 10: each of the four n-gram lengths that a caption lacks counts 0.
        `matched_boxes`: number of pairs.
        `recall`: share of ground truths that were matched.
        Without pairs the first three are 0; without ground truth all but `matched_boxes` are -1.
    """
    pairs: list[tuple[str, str]] = []
    corpus: list[list[str]] = []
    for prediction, _, objects in scored_pairs(predictions, samples):
        corpus += [[item.caption] for item in objects if not item.iscrowd]
        pairs += match_captions(prediction, objects, score_threshold)
    found, wanted = [caption for caption, _ in pairs], [[caption] for _, caption in pairs]
    sums = {
        "caption_match": sum(normalized_caption(caption) == normalized_caption(own) for caption, own in pairs),
        f"caption_{scorer.name}": sum(scorer(found, wanted)),
        "caption_cider_d": sum(cider_d(found, wanted, corpus)),
    }
    return {
        **{name: value / max(len(pairs), 1) if corpus else UNDEFINED for name, value in sums.items()},
        "matched_boxes": float(len(pairs)),
        "recall": len(pairs) / len(corpus) if corpus else UNDEFINED,
    }


FRAME = 720  # pixels of the longer side of an image when boxes are compared
MERGE_IOU = 0.7
IOU_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
TEXT_THRESHOLDS = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25)
RECALLS = torch.arange(100, dtype=torch.float64) / 100


def dense_captioning(
    predictions: Sequence[Prediction], samples: Sequence[Sample], scorer: TextScorer
) -> dict[str, float]:
    """Compute the average precision of boxes with captions, over thresholds of both.

    Overlapping ground truths are merged. By falling score, each detection is assigned the merged truth that it overlaps
    most; only the first one assigned can be true, even if it fails a threshold. It is true if its IoU reaches the IoU
    threshold and its text score is strictly above the text threshold.

    Corners are used as they are: `Sample`'s x2 is x1 + width, and an inclusive area is a pixel wider than that. The
    original code's corners are last pixels, x1 + width - 1, so its scores are slightly lower.

    Beyond the definition: a detection that overlaps nothing takes no truth (the original code gives it the last one);
    crowd regions are not truths, and detections in one are ignored as in COCO, as are those of `is_unsure` that take no
    truth; equal scores keep the given order.

    Returns:
        `densecap_map_{scorer.name}`: mean AP of the 30 pairs of thresholds.
        `densecap_map_boxes`: mean of the five IoU thresholds without regard to text. Both -1 without ground truth.
    """
    rows = [np.empty((0, 5))]  # score, IoU, is first, text score, share in a crowd
    num_truths = 0
    for prediction, sample, objects in scored_pairs(predictions, samples):
        image, count = _measure(prediction, sample, objects, scorer)
        rows.append(image)
        num_truths += count
    names = (f"densecap_map_{scorer.name}", "densecap_map_boxes")
    if not num_truths:
        return dict.fromkeys(names, UNDEFINED)
    table = torch.from_numpy(np.concatenate(rows))
    table = table[table[:, 0].argsort(descending=True, stable=True)]
    overlap, is_first, text, crowd = table[:, 1:].unbind(1)
    cells, box_cells = [], []
    for threshold in IOU_THRESHOLDS:
        assigned = (is_first > 0) & (overlap >= threshold)
        counted = assigned | (crowd < threshold)
        box_cells.append(average_precision(assigned[counted], num_truths))
        for text_threshold in TEXT_THRESHOLDS:
            cells.append(average_precision((assigned & (text > text_threshold))[counted], num_truths))
    return dict(zip(names, (sum(cells) / len(cells), sum(box_cells) / len(box_cells)), strict=True))


def _measure(
    prediction: Prediction, sample: Sample, objects: Sequence[Object], scorer: TextScorer
) -> tuple[Float64[np.ndarray, "D 5"], int]:
    """Return the `rows` of `dense_captioning` for one image, and its number of merged truths."""
    found = sorted(prediction.objects, key=lambda item: -item.score)
    assigned = _assigned(found, sample, objects)
    rows = np.zeros((len(found), 5))
    rows[:, 0] = [item.score for item in found]
    rows[:, 1], rows[:, 2] = assigned.overlaps, assigned.is_first
    rows[:, 4] = np.maximum(assigned.share_in_crowd, is_unsure(found, sample).numpy())
    references = [assigned.truths[int(assigned.owners[row])] for row in assigned.read]
    rows[assigned.read, 3] = scorer([found[row].caption for row in assigned.read], references)
    return rows, len(assigned.truths)


@dataclass(frozen=True)
class _Assigned:
    """The D detections of an image, by falling score, and its merged truths, without regard to captions."""

    truths: Sequence[Sequence[str]]  # the captions of each
    overlaps: Float64[np.ndarray, " D"]  # see `assign`
    owners: Int64[np.ndarray, " D"]
    is_first: Bool[np.ndarray, " D"]
    share_in_crowd: Float64[np.ndarray, " D"]
    read: Sequence[int]  # the detections that may be true, whose captions are scored


def _assigned(found: Sequence[DetectedObject], sample: Sample, objects: Sequence[Object]) -> _Assigned:
    scale = FRAME / max(sample.width, sample.height)
    boxes = boxes_of(found).numpy() * scale
    singles, crowds = split_crowds(objects)
    truth_boxes, truths = merge_truths(singles, scale)
    overlaps, owners, is_first = assign(inclusive_iou(boxes, truth_boxes))
    read = np.flatnonzero(is_first & (overlaps >= min(IOU_THRESHOLDS))).tolist()
    return _Assigned(truths, overlaps, owners, is_first, share_inside(boxes, crowds.numpy() * scale), read)


def merge_truths(truths: list[Object], scale: float) -> tuple[Float64[np.ndarray, "C 4"], list[list[str]]]:
    """Merge truths with an IoU of at least `MERGE_IOU` greedily, the largest cluster first, of equal ones the first.

    Boxes are multiplied by `scale`, from pixels of the image to pixels of the frame.

    Returns:
        Of each of C clusters the mean box, xyxy in pixels of the frame, and all captions.
    """
    boxes = boxes_of(truths).numpy() * scale
    is_near = inclusive_iou(boxes, boxes) >= MERGE_IOU
    if is_near.sum() == len(truths):  # each only itself
        return boxes, [[item.caption] for item in truths]
    merged, captions = [], []
    while is_near.any():
        members = np.flatnonzero(is_near[is_near.sum(1).argmax()])
        merged.append(boxes[members].mean(0))
        captions.append([truths[index].caption for index in members])
        is_near[members] = False
        is_near[:, members] = False
    return np.stack(merged), captions


def assign(
    iou: Float64[np.ndarray, "D T"],
) -> tuple[Float64[np.ndarray, " D"], Int64[np.ndarray, " D"], Bool[np.ndarray, " D"]]:
    """Assign each detection the truth that it overlaps most, whether or not another has it.

    Args:
        iou: Of detections by falling score and truths.

    Returns:
        The overlap; the truth, -1 if none is overlapped; whether it is the first with this truth.
    """
    if not iou.size:
        return np.zeros(len(iou)), np.full(len(iou), -1), np.zeros(len(iou), dtype=bool)
    truth = iou.argmax(1)  # of equal ones the first
    overlap = iou.max(1)
    truth[overlap <= 0] = -1
    is_first = np.zeros(len(truth), dtype=bool)
    is_first[np.unique(truth, return_index=True)[1]] = True
    return overlap, truth, is_first & (truth >= 0)


def average_precision(is_true: Tensor, num_truths: int) -> float:
    """Return the mean over `RECALLS` of the best precision at that recall or above; `is_true` is by falling score."""
    if not len(is_true):
        return 0.0
    hits = is_true.double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    place = torch.searchsorted(hits / num_truths, RECALLS)  # the first detection at which the recall is reached
    return float(torch.cat([best, best.new_zeros(1)])[place].mean())


def inclusive_iou(boxes: Float64[np.ndarray, "N 4"], others: Float64[np.ndarray, "M 4"]) -> Float64[np.ndarray, "N M"]:
    """Return the IoU of boxes, xyxy with inclusive corners: from 0 to 9 are 10 pixels.

    In numpy, which takes less than half of torch's time for the few boxes of an image, with the same bits.
    """
    shared = _inclusive_intersection(boxes, others)
    return shared / (_inclusive_area(boxes)[:, None] + _inclusive_area(others) - shared)


def share_inside(boxes: Float64[np.ndarray, "N 4"], regions: Float64[np.ndarray, "C 4"]) -> Float64[np.ndarray, " N"]:
    """Return the largest share of each box inside one of the regions, with inclusive areas; 0 without any."""
    if not len(regions):
        return np.zeros(len(boxes))
    return (_inclusive_intersection(boxes, regions) / _inclusive_area(boxes)[:, None]).max(1)


def _inclusive_intersection(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    sides = np.maximum(high - low + 1, 0)
    return sides[..., 0] * sides[..., 1]


def _inclusive_area(boxes: np.ndarray) -> np.ndarray:
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    return sides[:, 0] * sides[:, 1]


MAX_NGRAM = 4
SIGMA = 6.0  # of the penalty on a difference in length, in words
SCALE = 10.0

NGram = tuple[str, ...]


def cider_d(
    candidates: Sequence[str], references: Sequence[Sequence[str]], corpus: Sequence[Sequence[str]] | None = None
) -> list[float]:
    """Return the CIDEr-D of each candidate, the mean over its references, from 0 to 10.

    The documents of `corpus`, each the captions of one thing, define how rare n-grams are; default: `references`. With
    one document every score is 0, as nothing is rare.

    Raises:
        ValueError: A candidate has no reference.
    """
    missing = [index for index, own in enumerate(references) if not own]
    if missing:
        raise ValueError(f"candidates {missing[:5]} have no reference: leave them out")
    documents = references if corpus is None else corpus
    holders: Counter[NGram] = Counter()  # in how many documents an n-gram is
    ngrams_of = cache(_ngrams_of)  # captions recur
    for texts in documents:
        holders.update({ngram for text in texts for ngram in ngrams_of(text)})
    rarity = {ngram: math.log(len(documents) / count) for ngram, count in holders.items()}
    unseen = math.log(max(len(documents), 1))
    vector_of = cache(lambda text: _Vector(ngrams_of(text), rarity, unseen))
    scores = []
    for candidate, own in zip(candidates, references, strict=True):
        found = vector_of(candidate)
        scores.append(SCALE * sum(found.similarity(vector_of(text)) for text in own) / len(own))
    return scores


class _Vector:
    """The n-grams of a caption, each weighted by its count and rarity."""

    def __init__(self, ngrams: Mapping[NGram, int], rarity: Mapping[NGram, float], unseen: float):
        self.num_words = sum(count for ngram, count in ngrams.items() if len(ngram) == 1)
        self.weights = {ngram: count * rarity.get(ngram, unseen) for ngram, count in ngrams.items()}
        self.norms = [0.0] * MAX_NGRAM
        for ngram, weight in self.weights.items():
            self.norms[len(ngram) - 1] += weight**2
        self.norms = [math.sqrt(norm) for norm in self.norms]

    def similarity(self, other: "_Vector") -> float:
        """Return the mean over n of the clipped cosine, reduced for another length; in [0, 1]."""
        products = [0.0] * MAX_NGRAM
        for ngram, weight in self.weights.items():
            wanted = other.weights.get(ngram, 0.0)
            products[len(ngram) - 1] += min(weight, wanted) * wanted
        lengths = [own * others for own, others in zip(self.norms, other.norms, strict=True)]
        cosines = [product / length for product, length in zip(products, lengths, strict=True) if length]
        return sum(cosines) / MAX_NGRAM * math.exp(-((self.num_words - other.num_words) ** 2) / (2 * SIGMA**2))


def _ngrams_of(text: str) -> Counter[NGram]:
    words = words_of(text)
    return Counter(
        tuple(words[start : start + size]) for size in range(1, MAX_NGRAM + 1) for start in range(len(words) - size + 1)
    )
