"""Random flips, crops, sizes and colours of training images; boxes and texts follow.

What an occurrence of a sample is shown as is drawn from (seed, epoch, occurrence) and the record, before its image is
read: so the plan of an epoch knows its length. One function draws for one sample and for a million, with the same bits:
it uses only operations whose result IEEE 754 fixes, so no exponential.

Geometry changes only where the texts stay true (`moves_of`). Coordinates are pixels of the displayed image, xyxy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from hashlib import sha256
from typing import Self

import numpy as np
import torchvision.transforms.v2.functional as F
from jaxtyping import Bool, Float64, Int64, UInt8, UInt64
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode

from recipe.config import AugmentConfig, CropConfig
from recipe.data.chat import box_parts, texts_of, with_box_parts
from recipe.data.teachers import Purpose, random_words
from recipe.data.words import Vocabulary
from recipe.images import MAX_ASPECT_RATIO
from recipe.schema import Box, ImageSpec, Sample


class Word(IntEnum):
    """Which of an occurrence's random words decides what."""

    FLIP = 0
    CROP = 1
    AREA = 2
    RATIO = 3
    ANCHOR = 4
    LEFT = 5
    TOP = 6
    SCALE = 7
    COLOUR = 8
    BRIGHTNESS = 9
    CONTRAST = 10
    SATURATION = 11
    HUE = 12


NUM_WORDS = 16


class Moves(IntFlag):
    """How the geometry of a sample may change while its texts stay true."""

    NONE = 0
    SCALE = 1
    FLIP = 2
    CROP = 4


@dataclass(frozen=True)
class Shown:
    """How n occurrences are shown; one row per occurrence."""

    crops: Int64[np.ndarray, "n 4"]  # xyxy, the part of the image
    flips: Bool[np.ndarray, " n"]
    sizes: Int64[np.ndarray, "n 2"]  # width and height that the part is scaled to, before the model's own resize rule


@dataclass(frozen=True)
class Drawn:
    """How one occurrence of an image is shown."""

    stored: tuple[int, int]  # width and height of the displayed image
    crop: tuple[int, int, int, int]  # xyxy
    flip: bool
    size: tuple[int, int]  # as in `Shown.sizes`
    colour: tuple[float, float, float, float] | None  # factors of brightness, contrast, saturation; shift of the hue

    def apply(self, pixels: UInt8[Tensor, "3 height width"], size: tuple[int, int]) -> UInt8[Tensor, "3 rows columns"]:
        """Return the image as it is shown, (width, height) pixels large; raise ValueError if it is not `stored`."""
        if pixels.shape[1:] != self.stored[::-1]:
            raise ValueError(
                f"its image does not have the stated {self.stored[0]} x {self.stored[1]} pixels: convert the data set "
                "again"
            )
        left, top, right, bottom = self.crop
        pixels = F.crop_image(pixels, top, left, bottom - top, right - left)
        if (right - left, bottom - top) != size:
            pixels = F.resize_image(pixels, [size[1], size[0]], InterpolationMode.BICUBIC, antialias=True)
        if self.flip:
            pixels = F.horizontal_flip_image(pixels)
        if self.colour is not None:
            brightness, contrast, saturation, hue = self.colour
            pixels = F.adjust_brightness_image(pixels, brightness)
            pixels = F.adjust_contrast_image(pixels, contrast)
            pixels = F.adjust_saturation_image(pixels, saturation)
            pixels = F.adjust_hue_image(pixels, hue) if hue else pixels
        return pixels

    def describe(self) -> str:
        """Return what was drawn in words, such as `part (10, 0, 90, 60) of 120 x 60, as 160 x 120, flipped`."""
        (width, height), (left, top, right, bottom) = self.stored, self.crop
        whole = self.crop == (0, 0, width, height)
        parts = [f"whole {width} x {height}" if whole else f"part {self.crop} of {width} x {height}"]
        if self.size != (right - left, bottom - top):
            parts.append(f"as {self.size[0]} x {self.size[1]}")
        parts += ["flipped"] if self.flip else []
        if self.colour is not None:
            names = ("brightness", "contrast", "saturation", "hue")
            parts.append(", ".join(f"{name} {value:.2f}" for name, value in zip(names, self.colour, strict=True)))
        return ", ".join(parts)


def uniform(words: UInt64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """Return numbers in [0, 1) from uniform 64-bit words."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_shown(
    config: AugmentConfig,
    spec: ImageSpec,
    words: UInt64[np.ndarray, "n words"],
    sizes: Int64[np.ndarray, "n 2"],
    moves: UInt8[np.ndarray, " n"],
    anchors: Float64[np.ndarray, "a 4"],
    num_anchors: Int64[np.ndarray, " n"],
) -> Shown:
    """Draw how n occurrences are shown; a row depends on its own arguments alone.

    Args:
        config: The section `train_loader.augment`.
        spec: Its pixel budget bounds the size.
        words: Of `random_words`.
        sizes: (width, height) of the images.
        moves: Of `Moves`.
        anchors: Boxes of which a crop holds one whole, those of each image in turn.
        num_anchors: Of each image; without any the crop may be anywhere.
    """
    numbers = uniform(words)  # (n, words)
    count = len(sizes)
    wide, high = sizes.astype(np.float64).T  # (n,) each
    crops = np.zeros((count, 4), dtype=np.int64)
    crops[:, 2:] = sizes
    jitter = np.ones(count)
    resized = np.zeros(count, dtype=np.bool_)
    if config.scale_jitter is not None:
        least, most = config.scale_jitter
        resized = (moves & Moves.SCALE) > 0
        jitter = np.where(resized, least + numbers[:, Word.SCALE] * (most - least), 1.0)
    if config.crop is not None:
        parts = _draw_crops(config.crop, numbers, wide, high, anchors, num_anchors)
        cropped = (numbers[:, Word.CROP] < config.crop.probability) & ((moves & Moves.CROP) > 0)
        cropped &= (parts[:, 2] - parts[:, 0] < wide) | (parts[:, 3] - parts[:, 1] < high)
        crops[cropped] = parts[cropped]
        resized = resized | cropped
    crop_wide, crop_high = (crops[:, 2:] - crops[:, :2]).astype(np.float64).T
    own = wide * high if config.crop is not None and config.crop.enlarge else crop_wide * crop_high
    budget = spec.min_pixels, spec.max_pixels
    area = np.clip(np.clip(own, *budget) * (jitter * jitter), *budget)
    factor = np.sqrt(area / (crop_wide * crop_high))
    shown = np.maximum(np.rint(np.stack([crop_wide * factor, crop_high * factor], axis=1)), 1).astype(np.int64)
    # The model's own resize rule refuses narrower ones.
    narrow = shown.max(axis=1) > MAX_ASPECT_RATIO * shown.min(axis=1)
    untouched = ~resized | narrow
    crops[untouched, :2], crops[untouched, 2:] = 0, sizes[untouched]
    shown[untouched] = sizes[untouched]
    flips = (numbers[:, Word.FLIP] < config.horizontal_flip) & ((moves & Moves.FLIP) > 0)
    return Shown(crops, flips, shown)


def largest_sides(
    config: AugmentConfig, spec: ImageSpec, sizes: Float64[np.ndarray, "n 2"]
) -> Float64[np.ndarray, "2 n 2"]:
    """Return bounds of what `draw_shown` can draw as size: the widest and the highest, of the largest area.

    Both sides of no image that is drawn are larger than those of one of them, but for its ratio between the two.
    """
    areas = np.clip(sizes.prod(axis=1), spec.min_pixels, spec.max_pixels)
    if config.scale_jitter is not None:
        areas = np.clip(areas * config.scale_jitter[1] ** 2, spec.min_pixels, spec.max_pixels)
    ratios = np.stack([sizes[:, 0] / sizes[:, 1]] * 2)  # (2, n)
    if config.crop is not None:
        # Parts are rounded up to whole pixels, which changes the ratio of small ones.
        shares = [(config.crop.scale[0] * least) ** 0.5 for least in (config.crop.ratio[0], 1 / config.crop.ratio[1])]
        rounding = 1 + 1 / np.maximum(np.floor(sizes.min(axis=1) * min(shares)), 1)
        ratios = ratios * np.stack([config.crop.ratio[1] * rounding, config.crop.ratio[0] / rounding])
    return np.stack([np.sqrt(areas * ratios), np.sqrt(areas / ratios)], axis=2) + 1  # sizes are rounded to a pixel


def _draw_crops(
    config: CropConfig,
    numbers: NDArray[np.float64],
    wide: NDArray[np.float64],
    high: NDArray[np.float64],
    anchors: NDArray[np.float64],
    num_anchors: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return (n, 4) xyxy parts of images; each holds one of the image's anchors whole."""
    least, most = config.scale
    area = least + numbers[:, Word.AREA] * (most - least)
    ratio = _draw_ratio(config.ratio, numbers[:, Word.RATIO])
    # The anchor that each part must hold: xyxy in whole pixels, empty and anywhere if there is none.
    has_anchor = num_anchors > 0
    chosen = np.minimum(np.floor(numbers[:, Word.ANCHOR] * num_anchors).astype(np.int64), num_anchors - 1)
    rows = (np.cumsum(num_anchors) - num_anchors + chosen)[has_anchor]
    hold = np.stack([wide, high, np.zeros_like(wide), np.zeros_like(high)], axis=1)
    hold[has_anchor] = np.concatenate([np.floor(anchors[rows, :2]), np.ceil(anchors[rows, 2:])], axis=1)
    hold = np.clip(hold, 0.0, np.stack([wide, high, wide, high], axis=1))
    # Shares of the image's width and height, wide enough for the anchor; the ratio holds as the larger side decides.
    share_x = np.maximum(np.minimum(np.sqrt(area * ratio), 1.0), (hold[:, 2] - hold[:, 0]) / wide)
    share_y = np.maximum(np.minimum(np.sqrt(area / ratio), 1.0), (hold[:, 3] - hold[:, 1]) / high)
    share_y = np.maximum(share_y, share_x / config.ratio[1])
    share_x = np.maximum(share_x, share_y * config.ratio[0])
    part_wide, part_high = np.minimum(np.ceil(share_x * wide), wide), np.minimum(np.ceil(share_y * high), high)
    left = _draw_start(numbers[:, Word.LEFT], part_wide, wide, hold[:, 0], hold[:, 2])
    top = _draw_start(numbers[:, Word.TOP], part_high, high, hold[:, 1], hold[:, 3])
    return np.stack([left, top, left + part_wide, top + part_high], axis=1).astype(np.int64)


def _draw_ratio(bounds: Sequence[float], number: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ratios between two bounds around 1, as likely below 1 as above if the bounds are inverses."""
    least, most = bounds
    place = (1 - 1 / least) + number * (most - 1 - (1 - 1 / least))  # below 0: one less than the inverse ratio
    return np.where(place < 0, 1 / (1 + np.abs(place)), 1 + place)


def _draw_start(
    number: NDArray[np.float64],
    length: NDArray[np.float64],
    whole: NDArray[np.float64],
    first: NDArray[np.float64],
    end: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return where a part of `length` pixels starts, so that it holds `first` to `end`."""
    least = np.maximum(end - length, 0.0)
    most = np.minimum(first, whole - length)
    return least + np.floor(number * (most - least + 1))


def draw_colour(config: AugmentConfig, words: UInt64[np.ndarray, " words"]) -> tuple[float, float, float, float] | None:
    """Return an occurrence's factors of brightness, contrast and saturation and shift of the hue; None: as it is."""
    colour = config.colour
    numbers = uniform(words)
    if colour is None or numbers[Word.COLOUR] >= colour.probability:
        return None
    places = 2 * numbers[[Word.BRIGHTNESS, Word.CONTRAST, Word.SATURATION, Word.HUE]] - 1  # in [-1, 1)
    brightness, contrast, saturation, hue = places.tolist()
    return (
        1 + brightness * colour.brightness,
        1 + contrast * colour.contrast,
        1 + saturation * colour.saturation,
        hue * colour.hue,
    )


def move_boxes(
    boxes: Float64[np.ndarray, "b 4"], shown: Shown, images: Int64[np.ndarray, " b"]
) -> tuple[Float64[np.ndarray, "b 4"], Float64[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
    """Move boxes to where they are in the shown images.

    Args:
        boxes: Of the stored images.
        shown: How each image is shown.
        images: Whose image each box belongs to.

    Returns:
        The boxes, clipped; the share of each that is seen; whether it was cut.
    """
    crops, sizes = shown.crops[images].astype(np.float64), shown.sizes[images].astype(np.float64)
    spans = crops[:, 2:] - crops[:, :2]
    clipped = np.clip(boxes, np.tile(crops[:, :2], 2), np.tile(crops[:, 2:], 2))
    cut = (clipped != boxes).any(axis=1)
    sides = boxes[:, 2:] - boxes[:, :2]
    seen = (clipped[:, 2:] - clipped[:, :2]).prod(axis=1) / np.maximum(sides.prod(axis=1), 1e-9)
    moved = (clipped - np.tile(crops[:, :2], 2)) * np.tile(sizes / spans, 2)
    flips = shown.flips[images]
    left, right = moved[:, 0].copy(), moved[:, 2].copy()
    moved[:, 0] = np.where(flips, sizes[:, 0] - right, left)
    moved[:, 2] = np.where(flips, sizes[:, 0] - left, right)
    return moved, np.where(cut, seen, 1.0), cut


def is_kept(
    config: AugmentConfig,
    moved: Float64[np.ndarray, "b 4"],
    seen: Float64[np.ndarray, " b"],
    cut: Bool[np.ndarray, " b"],
) -> Bool[np.ndarray, " b"]:
    """Return which objects, from `move_boxes`, enough is left of."""
    if config.crop is None:
        return np.ones(len(moved), dtype=np.bool_)
    sides = (moved[:, 2:] - moved[:, :2]).min(axis=1)
    return ~cut | ((seen >= config.crop.least_visible) & (sides >= config.crop.least_pixels))


def has_one_image(sample: Sample) -> bool:
    """Return whether a sample has an image and no further ones, whose boxes would need draws of their own."""
    return sample.has_image and not sample.further


def moves_of(sample: Sample, vocabulary: Vocabulary) -> Moves:
    """Return how a sample's geometry may change: as its texts remain true whatever is drawn.

    A chat of its own must hold boxes, which then all stay whole, and no word of a side.
    """
    captions = [item.caption for item in sample.objects or ()]
    if not has_one_image(sample):
        return Moves.NONE
    if sample.messages is None:
        if sample.objects is None:
            return Moves.NONE
        flips = all(vocabulary.mirrored(caption) is not None for caption in captions)
        texts = captions
    else:
        if not box_parts(sample.messages):
            return Moves.NONE
        texts = [*captions, *texts_of(sample.messages)]
        flips = all(vocabulary.mirrored(text) == text for text in texts)
    crops = all(map(vocabulary.survives_crop, texts))
    return Moves.SCALE | (Moves.FLIP if flips else Moves.NONE) | (Moves.CROP if crops else Moves.NONE)


def boxes_of(sample: Sample) -> tuple[Float64[np.ndarray, "b 4"], int]:
    """Return the boxes that a sample's length depends on, and how many of them, the first, are anchors of a crop.

    In the detection chat they are its objects, each an anchor. In a chat of its own they are the box around all boxes
    of the text, its anchor, and those boxes. They are rounded to float32, as a plan keeps them.
    """
    if sample.messages is None:
        boxes = in_float32(item.box for item in sample.objects or () if not item.iscrowd)
        return boxes, len(boxes)
    boxes = in_float32(box_parts(sample.messages))
    around = np.concatenate([boxes[:, :2].min(axis=0, initial=np.inf), boxes[:, 2:].max(axis=0, initial=-np.inf)])
    return np.concatenate([around[None], boxes]), 1


def in_float32(boxes: Iterable[Box]) -> Float64[np.ndarray, "b 4"]:
    """Return boxes rounded to float32."""
    return np.array(list(boxes), dtype=np.float32).reshape(-1, 4).astype(np.float64)


@dataclass(frozen=True)
class Augmentation:
    """Shows samples as drawn.

    Attributes:
        spec: Its pixel budget bounds the size of an image.
        vocabulary: Of the config's words.
    """

    config: AugmentConfig
    spec: ImageSpec
    vocabulary: Vocabulary
    seed: int

    @classmethod
    def of(cls, config: AugmentConfig, spec: ImageSpec, seed: int) -> Self:
        """Return what a config says; raise ConfigError at a language without a table of words."""
        return cls(config, spec, Vocabulary(config.languages, config.words), seed)

    @property
    def is_same_size(self) -> bool:
        """Return whether every image keeps its size."""
        return self.config.crop is None and self.config.scale_jitter is None

    def digest(self) -> str:
        """Return 16 hex digits that identify what is drawn."""
        config = str(self.config).replace(", epochs=None", "")  # as in checkpoints from before this key
        return sha256(f"{config} {self.spec} {self.vocabulary.described}".encode()).hexdigest()[:16]

    def in_epoch(self, epoch: int) -> Self:
        """Return what applies in an epoch: no crop once `crop.epochs` are over."""
        is_over = (crop := self.config.crop) is not None and crop.epochs is not None and epoch >= crop.epochs
        return replace(self, config=replace(self.config, crop=None)) if is_over else self

    def words(self, epoch: int, first: int, num_occurrences: int) -> UInt64[np.ndarray, "{num_occurrences} words"]:
        """Return the random words of occurrences from `first` on."""
        return random_words(self.seed, epoch, first, num_occurrences, Purpose.AUGMENTATION, NUM_WORDS)

    def teacher_words(
        self, epoch: int, first: int, num_occurrences: int, num_teachers: int
    ) -> UInt64[np.ndarray, "{num_occurrences} {num_teachers} words"]:
        """Return those of the teachers that the occurrences are shown with."""
        count = num_teachers * NUM_WORDS
        words = random_words(self.seed, epoch, first, num_occurrences, Purpose.TEACHER_AUGMENTATION, count)
        return words.reshape(num_occurrences, num_teachers, NUM_WORDS)

    def show(
        self, sample: Sample, teachers: Sequence[Sample], epoch: int, occurrence: int
    ) -> tuple[Sample, list[Sample], list[Drawn | None]]:
        """Return an occurrence of a sample as it is shown, its teachers, and how each image, the teachers' first."""
        drawing = self.in_epoch(epoch)
        shown: list[tuple[Sample, Drawn | None]] = [(teacher, None) for teacher in teachers]
        if self.config.teachers and teachers:
            words = self.teacher_words(epoch, occurrence, 1, len(teachers))[0]
            shown = [drawing.draw(teacher, row) for teacher, row in zip(teachers, words, strict=True)]
        shown.append(drawing.draw(sample, self.words(epoch, occurrence, 1)[0]))
        *teachers, sample = (item for item, _ in shown)
        return sample, teachers, [drawn for _, drawn in shown]

    def draw(self, sample: Sample, words: UInt64[np.ndarray, " words"]) -> tuple[Sample, Drawn | None]:
        """Return a sample as its random words show it, and how; None unless it has one image."""
        if not has_one_image(sample):
            return sample, None
        moves, size = moves_of(sample, self.vocabulary), (sample.width, sample.height)
        colour = draw_colour(self.config, words)
        if not moves:
            return sample, Drawn(size, (0, 0, *size), False, size, colour)
        boxes, num_anchors = boxes_of(sample)
        shown = draw_shown(
            self.config,
            self.spec,
            words[None],
            np.array([size], dtype=np.int64),
            np.array([moves], dtype=np.uint8),
            boxes[:num_anchors],
            np.array([num_anchors], dtype=np.int64),
        )
        left, top, right, bottom = shown.crops[0].tolist()
        drawn = Drawn(size, (left, top, right, bottom), bool(shown.flips[0]), tuple(shown.sizes[0].tolist()), colour)
        return self.move(sample, shown), drawn

    def move(self, sample: Sample, shown: Shown) -> Sample:
        """Return a sample with its size, boxes and words as its image, the only one of `shown`, is shown."""

        def moved(boxes: Sequence[Box]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
            return move_boxes(in_float32(boxes), shown, np.zeros(len(boxes), dtype=np.int64))

        (width, height), (left, top, right, bottom) = shown.sizes[0].tolist(), shown.crops[0].tolist()
        objects, messages = sample.objects, sample.messages
        if objects is not None:
            boxes, seen, cut = moved([item.box for item in objects])
            kept = is_kept(self.config, boxes, seen, cut)
            scale = width * height / ((right - left) * (bottom - top))
            rows = zip(objects, boxes.tolist(), seen.tolist(), kept.tolist(), strict=True)
            objects = tuple(
                replace(
                    item,
                    box=tuple(box),
                    caption=(self.vocabulary.mirrored(item.caption) or "") if shown.flips[0] else item.caption,
                    area=None if item.area is None else item.area * share * scale,
                )
                for item, box, share, is_enough in rows
                if (share > 0 if item.iscrowd else is_enough)
            )
        if messages is not None:
            boxes, _, _ = moved(box_parts(messages))
            messages = tuple(with_box_parts(messages, [tuple(box) for box in boxes.tolist()]))
        return replace(sample, width=width, height=height, objects=objects, messages=messages)
