"""Scores by category: COCO's of each, what is taken for what, and the images with the most errors of each.

Captions are the categories, compared without case and outer blanks.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from recipe.metrics.boxes import CategoryScores, scores_per_category
from recipe.metrics.gather import FALSE, IGNORED, found_truths, is_unsure, normalized_caption, scored_pairs
from recipe.schema import Prediction, Sample

NOTHING = ""  # in a confusion: no object there, or none found
WORST_IMAGES = 10
LISTED = 30  # categories and confusions on the console
KEPT = 2000  # categories, and confusions, in the JSON: open captions would make it as long as the data


@dataclass(frozen=True)
class CategoryReport:
    """What an evaluation found out about each category.

    Attributes:
        scores: By category, most truths first.
        confusion: Number of pairs (true, predicted) of boxes that match at an IoU of .5 and have the score threshold;
            `NOTHING` for a truth that was missed and for a box that matches none. The most frequent first.
        worst: By category, up to ten (sample id, errors): truths missed or taken for another category, and boxes of
            the category that match nothing or another.
    """

    scores: Mapping[str, CategoryScores]
    confusion: Mapping[tuple[str, str], int]
    worst: Mapping[str, Sequence[tuple[str, int]]]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON takes it: the `KEPT` categories with most truths and the `KEPT` most frequent confusions.

        `scores_left_out` is the number of other categories, `confusion_left_out` that of boxes in other confusions.
        """
        names, pairs = list(self.scores), list(self.confusion.items())
        return {
            "scores": {name: asdict(self.scores[name]) for name in names[:KEPT]},
            "scores_left_out": len(names[KEPT:]),
            "confusion": [[true, found, count] for (true, found), count in pairs[:KEPT]],
            "confusion_left_out": sum(count for _, count in pairs[KEPT:]),
            "worst": {name: [*map(list, self.worst[name])] for name in names[:KEPT] if name in self.worst},
        }


def report_categories(
    predictions: Sequence[Prediction], samples: Sequence[Sample], score_threshold: float
) -> CategoryReport:
    """Return the report of an evaluation; crowd regions are ignored, and detections of `is_unsure` without a truth."""
    confusion: Counter[tuple[str, str]] = Counter()
    errors: dict[str, Counter[str]] = defaultdict(Counter)
    for prediction, sample, objects in scored_pairs(predictions, samples):
        kept = sorted((item for item in prediction.objects if item.score >= score_threshold), key=lambda it: -it.score)
        missed = {place for place, item in enumerate(objects) if not item.iscrowd}
        pairs: list[tuple[str, str]] = []
        places = found_truths(kept, objects, 0.5, is_unsure(kept, sample))
        for item, place in zip(kept, places, strict=True):
            if place == IGNORED:
                continue
            true = NOTHING if place == FALSE else normalized_caption(objects[place].caption)
            pairs.append((true, normalized_caption(item.caption)))
            missed.discard(place)
        pairs += [(normalized_caption(objects[place].caption), NOTHING) for place in sorted(missed)]
        confusion.update(pairs)
        for pair in pairs:
            for name in {*pair} - {NOTHING} if pair[0] != pair[1] else ():
                errors[name][sample.id] += 1
    scores = scores_per_category(predictions, samples)
    worst = {name: errors[name].most_common(WORST_IMAGES) for name in scores if errors[name]}
    return CategoryReport(scores, dict(confusion.most_common()), worst)


def category_table(report: CategoryReport) -> str:
    """Return the report as lines for a console: the scores of each category, then the most frequent confusions."""
    width = max([8, *(len(name) for name in list(report.scores)[:LISTED])])
    lines = [f"  {'category':<{width}}  truths     AP   AP50  recall  worst image (errors)"]
    for name, scores in list(report.scores.items())[:LISTED]:
        numbers = f"{scores.truths:>6}  {scores.ap:>5.3f}  {scores.ap50:>5.3f}   {scores.recall:>5.3f}"
        worst = [f"{image} ({count})" for image, count in report.worst.get(name, ())[:1]]
        lines.append(f"  {name:<{width}}  {numbers}  {''.join(worst)}".rstrip())
    if len(report.scores) > LISTED:
        lines.append(f"  and {len(report.scores) - LISTED} categories with fewer truths: see eval.json")
    mistaken = [(pair, count) for pair, count in report.confusion.items() if NOTHING not in pair and pair[0] != pair[1]]
    if mistaken:
        taken = ", ".join(f"{true} for {found} ({count})" for (true, found), count in mistaken[:LISTED])
        lines.append(f"  taken for another: {taken}")
    return "\n".join(lines)
