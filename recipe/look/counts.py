"""One pass over a data set's records: all that the page counts, in memory that does not grow with the set."""

import heapq
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise
from math import sqrt
from pathlib import Path

from recipe.data.encode import Encoder
from recipe.data.image import resized_size
from recipe.data.lengths import count_lengths
from recipe.metrics.gather import normalized_caption
from recipe.schema import ImageSpec, Sample

MOST_DISTINCT = 100_000  # captions or sizes that are counted one by one
LARGER = 4  # times the pixel budget, to see what more would bring
_CHUNK = 1024  # samples whose texts are tokenized per call
_EXAMPLES = 3  # of each reason to reject


class Histogram:
    """Counts of numbers between `edges`; `whole`: of whole numbers, which name the bins."""

    def __init__(self, edges: Sequence[float], whole: bool = False) -> None:
        self.edges, self.whole, self.counts = edges, whole, [0] * (len(edges) + 1)
        self.number, self.sum, self.largest = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        """Count a number."""
        self.counts[bisect_right(self.edges, value)] += 1
        self.number += 1
        self.sum += value
        self.largest = max(self.largest, value)

    @property
    def mean(self) -> float:
        """Return the mean of the numbers, 0 without any."""
        return self.sum / max(1, self.number)

    def rows(self) -> list[tuple[str, int]]:
        """Return (name, count) of each bin, without the empty ones at both ends."""
        low, high = f"{self.edges[0]:,}", f"{self.edges[-1]:,}"
        if self.whole:
            middle = [f"{a:,}" if a == b - 1 else f"{a:,} to {b - 1:,}" for a, b in pairwise(self.edges)]
            low = "0" if self.edges[0] == 1 else f"below {low}"
        else:
            middle, low = [f"{a:,} to {b:,}" for a, b in pairwise(self.edges)], f"below {low}"
        rows = list(zip([low, *middle, f"{high} and more"], self.counts, strict=True))
        filled = [position for position, (_, count) in enumerate(rows) if count]
        return rows[filled[0] : filled[-1] + 1] if filled else []


class Distinct:
    """Counts of different values; at more than `MOST_DISTINCT` further ones are only counted together."""

    def __init__(self) -> None:
        self.counts, self.others = Counter[str](), 0

    def add(self, value: str) -> None:
        """Count a value."""
        if value in self.counts or len(self.counts) < MOST_DISTINCT:
            self.counts[value] += 1
        else:
            self.others += 1

    @property
    def total(self) -> int:
        """Return how many values were counted."""
        return self.counts.total() + self.others

    def describe(self, noun: str) -> str:
        """Return how many different ones there are, such as `3 different captions`."""
        number = f"more than {MOST_DISTINCT:,}" if self.others else f"{len(self.counts):,}"
        return f"{number} different {noun}{'s' * (number != '1')}"

    def rows(self, most: int) -> list[tuple[str, int]]:
        """Return the most frequent values with their counts, and the sum of the rest."""
        top = self.counts.most_common(most)
        rest = self.total - sum(count for _, count in top)
        return [*top, *([("all others", rest)] if rest else [])]


class Best:
    """The samples of the largest keys, with their positions in the set; the first of equal ones."""

    def __init__(self, most: int) -> None:
        self.most, self.heap = most, list[tuple[float, int, Sample]]()

    def add(self, key: float, position: int | None, sample: Sample) -> None:
        """Offer a sample; without a position it is not shown."""
        if position is None:
            return
        if len(self.heap) < self.most:
            heapq.heappush(self.heap, (key, -position, sample))
        elif (key, -position) > self.heap[0][:2]:
            heapq.heapreplace(self.heap, (key, -position, sample))

    def found(self) -> list[tuple[int, Sample]]:
        """Return (position, sample), the largest key first."""
        return [(-position, sample) for _, position, sample in sorted(self.heap, key=lambda row: row[:2], reverse=True)]


@dataclass
class Contents:
    """What a data set holds. Objects are those that are no crowd regions.

    Attributes:
        spec: Of the model's images; its `max_pixels` is the pixel budget.
        num_shown: Images of `spread`; the other lists hold a third of it.
        encoder: Counts tokens; None: they stay unknown.
        smaller: Objects smaller than a vision token, now and at `LARGER` times the budget.
        sides: Of objects, the root of width times height, in vision tokens of the resized image.
    """

    spec: ImageSpec
    num_shown: int
    encoder: Encoder | None = None
    samples: int = 0
    images: int = 0
    empty: int = 0
    not_annotated: int = 0
    text_only: int = 0
    chats: int = 0
    reduced: int = 0
    searched: int = 0
    objects: int = 0
    crowds: int = 0
    repeated: int = 0
    covering: int = 0
    smaller: list[int] = field(default_factory=lambda: [0, 0])
    unusable: int = 0
    first_unusable: str = ""
    captions: Distinct = field(default_factory=Distinct)
    sizes: Distinct = field(default_factory=Distinct)
    words: Histogram = field(default_factory=lambda: Histogram((1, 2, 3, 5, 9, 17, 33), whole=True))
    per_image: Histogram = field(default_factory=lambda: Histogram((1, 2, 3, 5, 9, 17, 33, 65, 101, 301), whole=True))
    sides: Histogram = field(default_factory=lambda: Histogram((1, 2, 4, 8, 16)))
    longest: Histogram = field(default_factory=lambda: Histogram((257, 513, 769, 1025, 1537, 2049, 4097), whole=True))
    aspects: Histogram = field(default_factory=lambda: Histogram((0.33, 0.5, 0.8, 1.25, 2, 3)))
    image_tokens: Histogram = field(
        default_factory=lambda: Histogram((65, 129, 257, 513, 1025, 2049, 4097), whole=True)
    )
    tokens: Histogram = field(
        default_factory=lambda: Histogram((129, 257, 513, 1025, 2049, 4097, 8193, 16385), whole=True)
    )

    def __post_init__(self) -> None:
        few = -(-self.num_shown // 3)
        self.larger = replace(self.spec, max_pixels=LARGER * self.spec.max_pixels)
        self.spread = Best(self.num_shown)
        self.shown = {
            "Most objects": Best(few),
            "Smallest objects": Best(few),
            "Smallest images": Best(few),
            "Crowd regions": Best(few),
            "Known to hold nothing": Best(few),
            "Not annotated": Best(few),
        }
        self.texts = Best(few)

    @property
    def annotated(self) -> int:
        """Return the images whose objects are known."""
        return self.images - self.not_annotated

    def read(self, samples: Iterable[Sample]) -> None:
        """Count all samples, without their images, in stored order."""
        chunk: list[Sample] = []
        for position, sample in enumerate(samples):
            self._add(position, sample)
            if self.encoder is not None:
                chunk.append(sample)
                if len(chunk) == _CHUNK:
                    self._count_tokens(chunk, self.encoder)
                    chunk = []
        if chunk and self.encoder is not None:
            self._count_tokens(chunk, self.encoder)

    def _add(self, position: int, sample: Sample) -> None:
        luck = int.from_bytes(blake2b(sample.id.encode(), digest_size=6).digest(), "big")
        self.samples += 1
        self.chats += sample.messages is not None
        if not sample.has_image:
            self.text_only += 1
            self.texts.add(luck, position, sample)
            return
        for number, view in enumerate(sample.per_image()):  # of a chat's images the first may be shown
            self._add_image(luck, None if number else position, view)

    def _add_image(self, luck: int, position: int | None, sample: Sample) -> None:
        self.images += 1
        self._add_size(sample)
        self.spread.add(luck, position, sample)
        self.shown["Smallest images"].add(-sample.width * sample.height, position, sample)
        if sample.objects is None:
            self.not_annotated += 1
            self.shown["Not annotated"].add(luck, position, sample)
            return
        self.searched += sample.searched is not None
        objects = [item for item in sample.objects if not item.iscrowd]
        num_crowds = len(sample.objects) - len(objects)
        self.crowds += num_crowds
        self.per_image.add(len(objects))
        if not sample.objects:
            self.empty += 1
            self.shown["Known to hold nothing"].add(luck, position, sample)
        if num_crowds:
            self.shown["Crowd regions"].add(luck, position, sample)
        if objects:
            self.shown["Most objects"].add(len(objects), position, sample)
            self.repeated += len(objects) - len({(item.box, normalized_caption(item.caption)) for item in objects})
            self.shown["Smallest objects"].add(-self._add_objects(sample), position, sample)

    def _add_size(self, sample: Sample) -> None:
        width, height = resized_size(sample.width, sample.height, self.spec)
        self.sizes.add(f"{sample.width} x {sample.height}")
        self.longest.add(max(sample.width, sample.height))
        self.aspects.add(sample.width / sample.height)
        self.image_tokens.add(width * height // _token_side(self.spec) ** 2)
        self.reduced += sample.width * sample.height > self.spec.max_pixels

    def _add_objects(self, sample: Sample) -> float:
        """Count the objects of an image; return the side of the smallest in tokens."""
        scales = []
        for spec in (self.spec, self.larger):
            width, height = resized_size(sample.width, sample.height, spec)
            scales.append(sqrt(width * height / (sample.width * sample.height)) / _token_side(spec))
        smallest = float("inf")
        for item in sample.objects or ():
            if item.iscrowd:
                continue
            x1, y1, x2, y2 = item.box
            side = sqrt((x2 - x1) * (y2 - y1))
            self.objects += 1
            self.captions.add(item.caption)
            self.words.add(len(item.caption.split()))
            self.sides.add(side * scales[0])
            self.covering += side * side >= 0.95 * sample.width * sample.height
            for number, scale in enumerate(scales):
                self.smaller[number] += side * scale < 1
            smallest = min(smallest, side * scales[0])
        return smallest

    def _count_tokens(self, samples: Sequence[Sample], encoder: Encoder) -> None:
        """Count the tokens of a chunk; if one of its samples cannot be used, of each alone."""
        try:
            for count in count_lengths(samples, encoder).tokens.tolist():
                self.tokens.add(count)
        except ValueError as error:
            if len(samples) > 1:
                for sample in samples:
                    self._count_tokens([sample], encoder)
                return
            self.unusable += 1
            self.first_unusable = self.first_unusable or str(error)


def _token_side(spec: ImageSpec) -> int:
    """Return the pixels along one side of a vision token."""
    return spec.patch_size * spec.merge_size


@dataclass
class RejectedRecords:
    """The rejected records of a split: how many per reason, and the first few of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)


def read_rejected(path: Path, split: str) -> RejectedRecords:
    """Return what a conversion lists of a split in rejected.jsonl; nothing if there is no such file.

    Raises:
        ValueError: The file is not such a list.
    """
    found = RejectedRecords()
    try:
        for row in _lines(path):
            if row["split"] == split:
                found.counts[row["reason"]] += 1
                examples = found.examples.setdefault(row["reason"], [])
                if len(examples) < _EXAMPLES:
                    examples.append({key: str(row[key]) for key in ("id", "source", "detail")})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of rejected records ({error!r}): move it away") from error
    return found


def _lines(path: Path) -> Iterator[dict[str, str]]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
