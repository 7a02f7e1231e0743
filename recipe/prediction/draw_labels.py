"""The text of a label, in letters the fonts here have, and where it goes so that it hides least."""

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

Font = ImageFont.FreeTypeFont
Rectangle = tuple[float, float, float, float]

# Pillow's own font has ASCII and little else; these are looked for by name where the system keeps its fonts.
_WIDER_FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "NotoSans-Regular.ttf",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "arial.ttf",
)
_MOST_LETTERS = 400  # of a line: more than any holds, and a language model may repeat itself for pages
_NO_CHARACTER = "\uffff"  # never assigned: draws as the font's box for missing characters


@lru_cache(maxsize=32)
def _fonts(size: int) -> list[Font]:
    default = ImageFont.load_default(size=size)
    assert isinstance(default, Font), "Pillow without FreeType"
    fonts = [default]
    for name in _WIDER_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return fonts


@lru_cache(maxsize=4096)
def _has(font: Font, character: str) -> bool:
    if character.isspace():
        return True
    return bytes(font.getmask(character)) != bytes(font.getmask(_NO_CHARACTER))


def legible(text: str, size: int) -> tuple[str, Font]:
    """`text` and a font that can draw all of it.

    Blanks and control characters become single spaces. Where no font here has a character it loses its accent, or is
    written as its code point (u732b), so that no label is a row of empty boxes.
    """
    text = " ".join("".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text).split())
    fonts = _fonts(size)
    for font in fonts:
        if all(_has(font, letter) for letter in text):
            return text, font
    best = max(fonts, key=lambda font: sum(_has(font, letter) for letter in text))
    return "".join(letter if _has(best, letter) else _substitute(letter, best) for letter in text), best


def _substitute(letter: str, font: Font) -> str:
    plain = "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
    if plain and all(_has(font, part) for part in plain):
        return plain
    return "" if unicodedata.category(letter) in ("Mn", "Cf") else f"u{ord(letter):x} "


def wrapped(text: str, font: Font, width: float, max_lines: int, tail: str = "") -> list[str]:
    """`text` and a short `tail` in lines of at most `width` pixels, at least one; dots stand for what does not fit.

    The tail is never cut: it is the score.
    """
    text = text[: _MOST_LETTERS * max_lines]
    lines, line = [], ""
    for word in f"{text} {tail}".strip().split(" "):
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and font.getlength(word[:_MOST_LETTERS]) > width:
            head = _fitting(word, font, width)
            lines.append(head)
            word = word[len(head) :]
        line = word
    lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        end = f"... {tail}".strip()
        while last and font.getlength(last + end) > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + end]
    return lines


def line_height(font: Font) -> int:
    """Pixels from one line to the next."""
    ascent, descent = font.getmetrics()
    return ascent + descent


def _fitting(word: str, font: Font, width: float) -> str:
    """The most letters of a word's beginning that fit, at least one."""
    end = bisect_right(range(1, min(len(word), _MOST_LETTERS) + 1), width, key=lambda end: font.getlength(word[:end]))
    return word[: max(1, end)]


def place_labels(
    sizes: Sequence[tuple[float, float]], boxes: Sequence[Rectangle], width: float, height: float
) -> list[Rectangle]:
    """Puts each label by its box, inside the canvas, where it hides the fewest labels and boxes.

    Greedy in the order given, then two rounds in which every label moves again, knowing all others.

    Args:
        sizes: (width, height) of each label, pixels.
        boxes: xyxy of the box each label belongs to, pixels of the canvas.
        width: Of the canvas.
        height: Of the canvas.

    Returns:
        xyxy of each label, whole pixels.
    """
    if not boxes:
        return []
    obstacles = np.asarray(boxes, dtype=np.float64)  # (N, 4)
    candidates = [_candidates(size, box, width, height) for size, box in zip(sizes, boxes, strict=True)]
    fixed_costs = [
        _box_cost(spots, obstacles, own) + penalty for own, (spots, penalty) in enumerate(candidates)
    ]  # each (K,)
    placed = np.full((len(boxes), 4), -1e6)  # far away: not placed yet
    for _ in range(3):
        for own, (spots, _) in enumerate(candidates):
            others = np.delete(placed, own, axis=0)
            hidden = _intersections(_grown(spots, 2.0), others).sum(1) / _areas(spots)
            placed[own] = spots[np.argmin(fixed_costs[own] + 20.0 * hidden)]
    return [tuple(row) for row in placed.tolist()]


def _candidates(
    size: tuple[float, float], box: Rectangle, width: float, height: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(K, 4) places for a label and (K,) how much worse than the first each is by itself."""
    label_width, label_height = size
    x1, y1, x2, y2 = box
    centre = (x1 + x2 - label_width) / 2
    middle = (y1 + y2 - label_height) / 2
    spots: list[tuple[float, float, float]] = []
    for rank, x in enumerate((x1, x2 - label_width, centre)):
        spots.append((x, y1 - label_height - 1, 0.02 * rank))
        spots.append((x, y2 + 1, 0.1 + 0.02 * rank))
        spots.append((x, y1 + 1, 0.2 + 0.02 * rank))
        spots.append((x, y2 - label_height - 1, 0.25 + 0.02 * rank))
    for rank, y in enumerate((y1, y2 - label_height, middle)):
        spots.append((x2 + 1, y, 0.15 + 0.02 * rank))
        spots.append((x1 - label_width - 1, y, 0.17 + 0.02 * rank))
    # farther off, for crowded places: the label is then tied to its box by a line
    for distance in (0.6, 1.4, 2.4, 3.6, 5.0):
        away = distance * label_height
        for x in (x1 - away, centre, x2 - label_width + away):
            spots.append((x, y1 - label_height - away, 1.0 + 0.4 * distance))
            spots.append((x, y2 + away, 1.0 + 0.4 * distance))
        for y in (y1, middle, y2 - label_height):
            spots.append((x2 + away, y, 1.0 + 0.4 * distance))
            spots.append((x1 - label_width - away, y, 1.0 + 0.4 * distance))
    table: NDArray[np.float64] = np.asarray(spots, dtype=np.float64)
    left = np.clip(np.round(table[:, 0]), 0, max(np.floor(width - label_width), 0))
    top = np.clip(np.round(table[:, 1]), 0, max(np.floor(height - label_height), 0))
    return np.stack([left, top, left + label_width, top + label_height], axis=1), table[:, 2]


def _box_cost(spots: NDArray[np.float64], boxes: NDArray[np.float64], own: int) -> NDArray[np.float64]:
    """(K,) how much of the boxes each place hides: a small box covered is worse than a corner of a large one."""
    hidden = _intersections(spots, boxes)  # (K, N)
    share = hidden / np.maximum(_areas(boxes), 1.0) + 0.5 * hidden / _areas(spots)[:, None]
    share[:, own] *= 2.0
    edges = _intersections(spots, _grown(boxes, 2.0)) - _intersections(spots, _grown(boxes, -2.0))
    edges[:, own] = 0.0
    return 3.0 * share.sum(1) + 3.0 * edges.sum(1) / _areas(spots)


def _areas(rectangles: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.prod(np.maximum(rectangles[:, 2:] - rectangles[:, :2], 0.0), axis=1)


def _grown(rectangles: NDArray[np.float64], margin: float) -> NDArray[np.float64]:
    return rectangles + np.asarray([-margin, -margin, margin, margin])


def _intersections(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K, N) shared pixels."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.prod(np.maximum(high - low, 0.0), axis=2)
