"""One panel of a drawn sheet: a picture with boxes and labels, under a header that says what it shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageColor, ImageDraw

from recipe.prediction.draw_labels import Font, Rectangle, legible, line_height, place_labels, wrapped
from recipe.prediction.draw_layout import PAPER, flow, grid
from recipe.schema import Box

INK = (236, 238, 242)
PLAIN = "#b0b0b0"  # of what has no caption's colour
_FAINT_INK = (150, 156, 166)
STYLES = {"teacher": "dotted", "prediction": "solid", "truth": "dashed", "text answer": "double"}
# Dash and space in thicknesses of the line.
_DASHES = {"dashed": (5.0, 3.0), "dotted": (2.0, 2.5)}
_MOST_COVERED = 0.25  # of a picture, half of it of a small one: where labels would hide more, captions stand beneath
_SMALL = 26  # label sizes that a side of a small picture is long at most
_MOST_ROWS = 6  # of captions beneath


@dataclass(frozen=True)
class Mark:
    """A box in pixels of the picture, with its label."""

    box: Rectangle
    text: str
    score: str
    colour: str


@dataclass(frozen=True)
class Panel:
    """What a panel shows.

    Attributes:
        picture: In the size it is drawn in.
        kind: Of `STYLES`; another has no boxes.
        title: At the left of the header.
        note: At the right of the header, where there is room.
        marks: The boxes; the first lie on top.
        words: Written instead of the picture.
    """

    picture: Image.Image
    kind: str
    title: str
    note: str = ""
    marks: Sequence[Mark] = ()
    words: str = ""


def draw_panel(panel: Panel, title_size: int, label_size: int) -> Image.Image:
    """The header, the picture with its boxes and labels, and beneath it the captions that are too many for labels.

    The picture has margins where it is too small for a header and labels.
    """
    title, font = legible(panel.title, title_size)
    width = max(panel.picture.width, math.ceil(font.getlength(title)) + 3 * title_size, 12 * label_size)
    height = max(panel.picture.height, 6 * label_size)
    parts = [_header(panel, width, title_size)]
    if panel.words:
        return grid([*parts, _words(panel.words, width, height, title_size)], 1, 0)
    body = Image.new("RGB", (width, height), PAPER)
    left, top = (width - panel.picture.width) // 2, (height - panel.picture.height) // 2
    body.paste(panel.picture, (left, top))
    draw = ImageDraw.Draw(body)
    marks = [replace(mark, box=_moved(mark.box, left, top)) for mark in panel.marks]
    thickness = max(2, round(label_size / 5))
    for mark in reversed(marks):
        draw_box(draw, mark.box, mark.colour, thickness, STYLES[panel.kind])
    parts.append(body)
    marks = [mark for mark in marks if mark.text or mark.score]
    labels = [_Label.of(mark.text, mark.score, label_size, max(0.42 * width, 12 * label_size)) for mark in marks]
    area = math.prod(panel.picture.size)
    most_covered = area * (_MOST_COVERED if area > (_SMALL * label_size) ** 2 else _MOST_COVERED / 2)
    if sum(label.width * label.height for label in labels) > most_covered:
        parts.append(_captions(marks, width, label_size))
    else:
        _draw_labels(draw, (width, height), marks, labels)
    return grid(parts, 1, 0)


def drawable_box(box: Box, scale_x: float, scale_y: float, size: tuple[int, int]) -> Rectangle:
    """`box` in pixels of a picture of `size`, inside it, and large enough to be seen."""
    low_x, high_x = _drawable_span(box[0] * scale_x, box[2] * scale_x, size[0])
    low_y, high_y = _drawable_span(box[1] * scale_y, box[3] * scale_y, size[1])
    return low_x, low_y, high_x, high_y


def _drawable_span(low: float, high: float, limit: int) -> tuple[float, float]:
    low, high = (min(max(value if math.isfinite(value) else 0.0, 0.0), limit - 1.0) for value in sorted((low, high)))
    missing = min(8.0, limit - 1.0) - (high - low)
    if missing > 0:
        low = min(max(low - missing / 2, 0.0), limit - 1.0 - (high - low) - missing)
        high = low + min(8.0, limit - 1.0)
    return round(low), round(high)


def draw_box(draw: ImageDraw.ImageDraw, box: Rectangle, colour: str, thickness: int, style: str) -> None:
    """An outline in `colour` between thin ones, dark or bright, so that it shows on any ground."""
    if style in _DASHES:
        _draw_dashes(draw, box, colour, thickness, style)
        return
    x1, y1, x2, y2 = box
    line = thickness if style == "solid" else max(2, thickness // 2)
    lines = 1 if style == "solid" else 2
    width = (2 * lines - 1) * line
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_ink_on(colour), width=width + 2)
    for inset in range(0, width, 2 * line):
        if min(x2 - x1, y2 - y1) > 2 * inset:
            draw.rectangle((x1 + inset, y1 + inset, x2 - inset, y2 - inset), outline=colour, width=line)


def draw_pattern(draw: ImageDraw.ImageDraw, left: float, middle: float, size: int, style: str) -> None:
    """A small white box that shows a style beside letters of `size`."""
    box = round(left), round(middle - 0.55 * size), round(left + 1.6 * size), round(middle + 0.55 * size)
    draw_box(draw, box, "#ffffff", max(2, size // 7), style)


def _draw_dashes(draw: ImageDraw.ImageDraw, box: Rectangle, colour: str, thickness: int, style: str) -> None:
    x1, y1, x2, y2 = box
    dash, space = (round(length * thickness) for length in _DASHES[style])
    inset = thickness - 1
    sides = (
        ((x1, y1), (x2, y1), (0, inset)),
        ((x1, y2 - inset), (x2, y2 - inset), (0, inset)),
        ((x1, y1), (x1, y2), (inset, 0)),
        ((x2 - inset, y1), (x2 - inset, y2), (inset, 0)),
    )
    for grow, fill in ((1, _ink_on(colour)), (0, colour)):
        for (start_x, start_y), (end_x, end_y), (thick_x, thick_y) in sides:
            length = int(max(end_x - start_x, end_y - start_y))
            for offset in range(0, length + 1, dash + space):
                end = min(offset + dash, length)
                at = (offset, end, 0, 0) if end_x > start_x else (0, 0, offset, end)
                draw.rectangle(
                    (
                        start_x + at[0] - grow,
                        start_y + at[2] - grow,
                        start_x + at[1] + thick_x + grow,
                        start_y + at[3] + thick_y + grow,
                    ),
                    fill=fill,
                )


@dataclass(frozen=True)
class _Label:
    """A caption and its score in lines, with the size of the ground they stand on."""

    lines: list[str]
    font: Font
    width: float
    height: float

    @classmethod
    def of(cls, text: str, tail: str, size: int, widest: float, max_lines: int = 3) -> "_Label":
        text, font = legible(text, size)
        pad = round(size * 0.3)
        lines = wrapped(text, font, widest - 2 * pad, max_lines, tail)
        width = math.ceil(max(font.getlength(line) for line in lines)) + 2 * pad
        return cls(lines, font, width, len(lines) * line_height(font) + pad)

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float, colour: str) -> None:
        """At its upper left corner."""
        pad = round(self.font.size * 0.3)
        draw.rectangle((x, y, x + self.width - 1, y + self.height - 1), fill=colour, outline="black")
        for row, line in enumerate(self.lines):
            at = (x + pad, y + pad // 2 + row * line_height(self.font))
            draw.text(at, line, fill=_ink_on(colour), font=self.font)


def _draw_labels(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], marks: Sequence[Mark], labels: Sequence[_Label]
) -> None:
    places = place_labels([(label.width, label.height) for label in labels], [mark.box for mark in marks], *size)
    for mark, place in zip(marks, places, strict=True):
        _draw_leader(draw, mark, place)
    for mark, label, (x, y, _, _) in zip(marks, labels, places, strict=True):
        label.draw(draw, x, y, mark.colour)


def _draw_leader(draw: ImageDraw.ImageDraw, mark: Mark, place: Rectangle) -> None:
    """A line from a label to its box, where they are apart."""
    start = tuple(min(max((place[axis] + place[axis + 2]) / 2, mark.box[axis]), mark.box[axis + 2]) for axis in (0, 1))
    end = tuple(min(max(start[axis], place[axis]), place[axis + 2]) for axis in (0, 1))
    if math.dist(start, end) > 3:
        draw.line((start, end), fill=_ink_on(mark.colour), width=4)
        draw.line((start, end), fill=mark.colour, width=2)


def _captions(marks: Sequence[Mark], width: int, size: int) -> Image.Image:
    """The captions in their colours, the most frequent first, each with its number and the range of its scores."""
    scores: dict[tuple[str, str], list[str]] = {}
    for mark in marks:
        scores.setdefault((mark.text, mark.colour), []).append(mark.score)
    labels: list[tuple[_Label, str]] = []
    for (text, colour), found in sorted(scores.items(), key=lambda item: (-len(item[1]), item[0])):
        number = f"x {len(found)}" if len(found) > 1 else ""
        span = min(found) if min(found) == max(found) else f"{min(found)}-{max(found)}"
        labels.append((_Label.of(text, f"{number} {span}".strip(), size, width, 1), colour))
    gap = size // 3
    num_shown = sum(row < _MOST_ROWS for _, row in flow([label.width for label, _ in labels], width, gap))
    if num_shown < len(labels):
        more = _Label.of(f"and {len(labels) - num_shown + 1} more", "", size, width, 1)
        labels = [*labels[: num_shown - 1], (more, PLAIN)]
    places = flow([label.width for label, _ in labels], width, gap)
    row_height = max(label.height for label, _ in labels) + gap
    page = Image.new("RGB", (width, gap + round((places[-1][1] + 1) * row_height)), PAPER)
    draw = ImageDraw.Draw(page)
    for (label, colour), (x, row) in zip(labels, places, strict=True):
        label.draw(draw, x, gap + row * row_height, colour)
    return page


def _words(text: str, width: int, highest: int, font_size: int) -> Image.Image:
    """`text` in as many lines as `highest` pixels hold."""
    text, font = legible(text, font_size)
    height = round(1.2 * line_height(font))
    lines = wrapped(text, font, width - 2 * font_size, max(1, (highest - font_size) // height))
    page = Image.new("RGB", (width, font_size + len(lines) * height), PAPER)
    draw = ImageDraw.Draw(page)
    for row, line in enumerate(lines):
        draw.text((font_size, font_size // 2 + row * height), line, fill=INK, font=font)
    return page


def _header(panel: Panel, width: int, size: int) -> Image.Image:
    header = Image.new("RGB", (width, 2 * size), PAPER)
    draw = ImageDraw.Draw(header)
    left = size // 2
    if panel.kind in STYLES and not panel.words:
        draw_pattern(draw, 4, size, size, STYLES[panel.kind])
        left += 2 * size
    title, font = legible(panel.title, size)
    title = wrapped(title, font, width - left, 1)[0]
    draw.text((left, size), title, fill=INK, font=font, anchor="lm")
    note, note_font = legible(panel.note, round(0.85 * size))
    room = width - left - font.getlength(title) - 1.5 * size
    if note and room > 4 * size:
        note = wrapped(note, note_font, room, 1)[0]
        draw.text((width - 4, size), note, fill=_FAINT_INK, font=note_font, anchor="rm")
    return header


def _moved(box: Rectangle, x: float, y: float) -> Rectangle:
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def _ink_on(colour: str) -> str:
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "white"
