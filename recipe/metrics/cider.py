"""CIDEr-D (Vedantam, Zitnick and Parikh 2015): how alike captions are, rare words counting more."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from recipe.metrics.samples import (
    UNDEFINED,
    RowsPerSampleMetric,
    boxes_of,
    match_by_score,
    sample_key,
    scored_pairs,
)
from recipe.metrics.words import words_of
from recipe.schema import Prediction, Sample

MAX_NGRAM = 4
SIGMA = 6.0  # of the penalty on a difference in length, in words
SCALE = 10.0

NGram = tuple[str, ...]


class CaptionCider(RowsPerSampleMetric):
    """Mean CIDEr-D of the captions on matched boxes, matched as `recipe.metrics.dense_caption.CaptionMatch` does.

    The document frequencies are those of all ground-truth captions of the evaluation set, matched or not, so that the
    scale does not move with what a model finds. `compute` returns `caption_cider_d`: 0 without a matched pair, -1
    without ground truth. Captions of fewer than four words cannot reach 10: each of the four n-gram lengths that a
    caption lacks counts 0.
    """

    def __init__(self, score_threshold: float, iou_threshold: float = 0.5):
        super().__init__(width=1, dtype=torch.uint8)  # one line of JSON a sample: text is gathered as bytes
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold

    def update(self, predictions: list[Prediction], samples: list[Sample]) -> None:
        """Adds images.

        Raises:
            ValueError: The predictions do not belong to the samples.
        """
        keys, counts, rows = [], [], []
        for prediction, sample, objects in scored_pairs(predictions, samples):
            kept = [item for item in prediction.objects if item.score >= self.score_threshold]
            kept.sort(key=lambda item: -item.score)
            truths = [item for item in objects if not item.iscrowd]
            pairs = match_by_score(box_iou(boxes_of(kept), boxes_of(truths)), self.iou_threshold)
            captions = [item.caption for item in truths]
            line = json.dumps([captions, [[kept[row].caption, captions[column]] for row, column in pairs]]) + "\n"
            keys.append(sample_key(sample))
            counts.append(len(truths))
            rows.append(torch.tensor(list(line.encode()), dtype=torch.uint8)[:, None])
        self.append(keys, counts, rows)

    def compute(self) -> dict[str, Tensor]:
        """The score, over all ranks."""
        rows, num_truths = self.gathered()
        if not num_truths:
            return {"caption_cider_d": torch.tensor(UNDEFINED)}
        images = [json.loads(line) for line in rows.numpy().tobytes().splitlines()]
        corpus = [[caption] for captions, _ in images for caption in captions]
        pairs = [pair for _, own in images for pair in own]
        scores = cider_d([found for found, _ in pairs], [[wanted] for _, wanted in pairs], corpus)
        return {"caption_cider_d": torch.tensor(sum(scores) / max(len(scores), 1))}


def cider_d(
    candidates: Sequence[str], references: Sequence[Sequence[str]], corpus: Sequence[Sequence[str]] | None = None
) -> list[float]:
    """CIDEr-D of each candidate, mean over its references, from 0 to 10.

    Args:
        candidates: One caption each.
        references: At least one caption each.
        corpus: Documents, each the captions of one thing, from which the rarity of n-grams is counted; default:
            `references`. A corpus of one document makes every score 0: nothing in it is rare.

    Raises:
        ValueError: A candidate has no reference.
    """
    missing = [index for index, own in enumerate(references) if not own]
    if missing:
        raise ValueError(f"candidates {missing[:5]} have no reference: leave them out")
    documents = references if corpus is None else corpus
    rarity = _rarity(documents)
    unseen = math.log(max(len(documents), 1))
    scores = []
    for candidate, own in zip(candidates, references, strict=True):
        found = _Vector(candidate, rarity, unseen)
        scores.append(SCALE * sum(found.similarity(_Vector(text, rarity, unseen)) for text in own) / len(own))
    return scores


class _Vector:
    """The n-grams of a caption, each weighted by its count and rarity."""

    def __init__(self, text: str, rarity: Mapping[NGram, float], unseen: float):
        words = words_of(text)
        self.num_words = len(words)
        self.weights = {ngram: count * rarity.get(ngram, unseen) for ngram, count in _ngrams(words).items()}
        self.norms = [0.0] * MAX_NGRAM
        for ngram, weight in self.weights.items():
            self.norms[len(ngram) - 1] += weight**2
        self.norms = [math.sqrt(norm) for norm in self.norms]

    def similarity(self, other: "_Vector") -> float:
        """Mean over n of the clipped cosine, less for another length; in [0, 1]."""
        products = [0.0] * MAX_NGRAM
        for ngram, weight in self.weights.items():
            wanted = other.weights.get(ngram, 0.0)
            products[len(ngram) - 1] += min(weight, wanted) * wanted
        lengths = [own * others for own, others in zip(self.norms, other.norms, strict=True)]
        cosines = [product / length for product, length in zip(products, lengths, strict=True) if length]
        return sum(cosines) / MAX_NGRAM * math.exp(-((self.num_words - other.num_words) ** 2) / (2 * SIGMA**2))


def _ngrams(words: Sequence[str]) -> Counter[NGram]:
    return Counter(
        tuple(words[start : start + size]) for size in range(1, MAX_NGRAM + 1) for start in range(len(words) - size + 1)
    )


def _rarity(documents: Sequence[Sequence[str]]) -> dict[NGram, float]:
    """The logarithm of all documents over those with the n-gram."""
    holders: Counter[NGram] = Counter()
    for texts in documents:
        holders.update({ngram for text in texts for ngram in _ngrams(words_of(text))})
    return {ngram: math.log(len(documents) / count) for ngram, count in holders.items()}
