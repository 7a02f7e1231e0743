"""Pictures of predictions for people: boxes, captions and scores beside the truth and the text answer."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from PIL import Image, ImageColor, ImageDraw

from recipe.draw_labels import Font, Rectangle, legible, place_labels, wrapped
from recipe.pictures import open_image
from recipe.schema import Box, DetectedObject, Object, Prediction, Sample

_COLOURS = (
    "#ff453a", "#30d158", "#409cff", "#ffd60a", "#ff8c1a", "#da6bff",
    "#5fdcff", "#ff5fa8", "#b8f000", "#d19a5b", "#1fcfae", "#8f8dff",
)  # fmt: skip
_CROWD_COLOUR = "#b0b0b0"
_PAPER = (24, 26, 30)
_INK = (236, 238, 242)
_FAINT_INK = (150, 156, 166)
_GAP = 10
_CROWDED = 16  # boxes from which on a panel is drawn larger
_HEADER = 34  # pixels above a picture, which say what it shows
_MOST_TEACHERS = 4  # drawn; the others are counted
# Dash and space in thicknesses of the line; None: one line.
_LINES: dict[str, tuple[float, float] | None] = {"solid": None, "dashed": (5, 3), "dotted": (2, 2.5)}
_LEGEND = {
    "teacher": "teacher: a solved example the model was shown",
    "prediction": "prediction, with its score",
    "truth": "truth",
    "text answer": "text answer of the language model",
}
_STYLES = {"teacher": "dotted", "prediction": "solid", "truth": "dashed", "text answer": "solid"}


@dataclass(frozen=True)
class _Mark:
    """A box in pixels of the panel, with its label."""

    box: Rectangle
    text: str
    score: str
    colour: str


def draw_prediction(
    image: Image.Image,
    prediction: Prediction,
    truth: Sample | None = None,
    score_threshold: float = 0.3,
    teachers: Sequence[Sample] = (),
    with_head: bool = True,
) -> Image.Image:
    """Draws what the model says of a picture: panels teachers | prediction | truth | text answer, and their legend.

    Small pictures are enlarged, very large ones reduced. A caption has the same colour in all panels.

    Args:
        image: RGB, in the displayed orientation (`recipe.pictures.open_image`).
        prediction: Objects below `score_threshold` are left out. The answer's panel is drawn where there is an answer.
        truth: The sample, for the truth's panel; left out where it is None or not annotated.
        score_threshold: Least score of a drawn object.
        teachers: The solved examples the model was shown, with their pictures.
        with_head: Draw the head's panel; False where it was not asked.
    """
    found = [item for item in prediction.objects if item.score >= score_threshold] if with_head else []
    wanted = () if truth is None else truth.objects or ()
    answered = prediction.answer_objects or ()
    shown = teachers[:_MOST_TEACHERS]
    taught = [item for teacher in shown for item in teacher.objects or ()]
    colours = _caption_colours(item.caption for item in (*found, *wanted, *answered, *taught))
    size = _panel_size(image.size, max(len(found), len(wanted), len(answered)))
    scale = size[0] / prediction.width, size[1] / prediction.height
    canvas = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)

    contents: list[tuple[str, Sequence[DetectedObject | Object], str]] = []
    if with_head:
        contents.append(("prediction", found, f"prediction: {_count(len(found), 'box')} from {score_threshold:.2f}"))
    if truth is not None and truth.objects is not None:
        contents.append(("truth", wanted, f"truth: {_count(len(wanted), 'object')}"))
    if prediction.answer is not None or prediction.answer_objects is not None:
        outcome = "could not be parsed" if prediction.answer_objects is None else _count(len(answered), "box")
        contents.append(("text answer", answered, f"text answer: {outcome}"))
    panels = []
    for kind, objects, title in contents:
        marks = [_mark(item, scale, size, colours, kind == "prediction") for item in objects]
        panels.append(_panel(canvas, marks, title, "" if panels else prediction.id, _STYLES[kind]))
    if shown:
        panels.insert(0, _teacher_column(shown, len(teachers) - len(shown), size, colours))
    kinds = ["teacher"] * bool(shown) + [kind for kind, _, _ in contents]
    return _beside(panels) if len(kinds) < 2 else _with_legend(_beside(panels), kinds)


def draw_gallery(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Lays pictures out in rows, each column as wide as its widest picture and each row as high as its highest.

    Raises:
        ValueError: There is nothing to lay out, or no column.
    """
    if not pictures or columns < 1:
        raise ValueError(f"cannot lay out {len(pictures)} pictures in {columns} columns: both must be at least 1")
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(len(rows[0]))]
    heights = [max(picture.height for picture in row) for row in rows]
    margin = 2 * _GAP
    sheet = Image.new(
        "RGB", (sum(widths) + margin * (len(widths) + 1), sum(heights) + margin * (len(rows) + 1)), _PAPER
    )
    y = margin
    for row, height in zip(rows, heights, strict=True):
        x = margin
        for picture, width in zip(row, widths, strict=False):
            sheet.paste(picture, (x, y))
            x += width + margin
        y += height + margin
    return sheet


def _key(caption: str) -> str:
    return caption.strip().casefold()


def _caption_colours(captions: Iterable[str]) -> dict[str, str]:
    """A colour a caption: the same in every picture, unless two captions of one picture want the same."""
    free = list(_COLOURS)
    colours = {}
    for caption in sorted({_key(caption) for caption in captions}):
        if not free:
            free = list(_COLOURS)
        wish = blake2b(caption.encode(), digest_size=4).digest()
        colour = _COLOURS[int.from_bytes(wish, "big") % len(_COLOURS)]
        if colour not in free:
            colour = free[0]
        free.remove(colour)
        colours[caption] = colour
    return colours


def _panel_size(size: tuple[int, int], num_boxes: int) -> tuple[int, int]:
    """The picture's size in a panel: its shorter side at least 480 pixels, more when crowded; at most 1600 long."""
    shorter, longer = min(size), max(size)
    scale = max(1.0, (480 if num_boxes < _CROWDED else 800) / shorter)
    scale = min(scale, 1600 / longer)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _drawable_box(box: Box, scale_x: float, scale_y: float, size: tuple[int, int]) -> Rectangle:
    """`box` in pixels of the panel, inside it, and large enough to be seen."""
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


def _mark(
    item: DetectedObject | Object,
    scale: tuple[float, float],
    size: tuple[int, int],
    colours: dict[str, str],
    with_score: bool = False,
) -> _Mark:
    box = _drawable_box(item.box, *scale, size)
    if isinstance(item, Object) and item.iscrowd:
        return _Mark(box, f"{item.caption or 'objects'} (crowd)", "", _CROWD_COLOUR)
    score = f"{item.score:.2f}" if with_score and isinstance(item, DetectedObject) else ""
    return _Mark(box, item.caption, score, colours[_key(item.caption)])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun if number == 1 else noun + ('es' if noun.endswith('x') else 's')}"


def _teacher_column(
    teachers: Sequence[Sample], num_more: int, size: tuple[int, int], colours: dict[str, str]
) -> Image.Image:
    """The solved examples, one above the other, beside panels of pictures of `size`."""
    limit = (round(0.7 * size[0]), max(240, size[1] // len(teachers) - _HEADER))
    panels = []
    for number, teacher in enumerate(teachers, start=1):
        factor = min(limit[0] / teacher.width, limit[1] / teacher.height)
        small = (max(1, round(teacher.width * factor)), max(1, round(teacher.height * factor)))
        canvas = open_image(teacher.image).resize(small, Image.Resampling.LANCZOS)
        scale = small[0] / teacher.width, small[1] / teacher.height
        marks = [_mark(item, scale, small, colours) for item in teacher.objects or ()]
        more = f" of {number + num_more}" if num_more and number == len(teachers) else ""
        panels.append(_panel(canvas, marks, f"teacher {number}{more}", teacher.id, _STYLES["teacher"]))
    column = Image.new("RGB", (max(panel.width for panel in panels), sum(panel.height for panel in panels)), _PAPER)
    y = 0
    for panel in panels:
        column.paste(panel, (0, y))
        y += panel.height
    return column


def _with_legend(sheet: Image.Image, kinds: Sequence[str]) -> Image.Image:
    """The sheet above what tells the lines of the boxes apart: one row, more where the sheet is narrow."""
    font = legible("", 15)[1]
    entries = [*((_LEGEND[kind], _STYLES[kind]) for kind in kinds), ("equal captions have equal colours", "")]
    left, places = _GAP + 4, list[tuple[int, int]]()
    x, y = left, sheet.height + _HEADER // 2 - 4
    for text, style in entries:
        width = (40 if style else 0) + math.ceil(font.getlength(text))
        if x > left and x + width > sheet.width - _GAP:
            x, y = left, y + _HEADER
        places.append((x, y))
        x += width + 28
    whole = Image.new("RGB", (sheet.width, y + _HEADER // 2 + 4), _PAPER)
    whole.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(whole)
    for (x, y), (text, style) in zip(places, entries, strict=True):
        if style:
            _draw_box(draw, (x, y - 9, x + 30, y + 9), "#ffffff", 2, style)
        draw.text((x + 40 if style else x, y), text, fill=_INK, font=font, anchor="lm")
    return whole


def _panel(canvas: Image.Image, marks: Sequence[_Mark], title: str, note: str, style: str) -> Image.Image:
    """The picture with its marks, under a header that says what it shows."""
    picture = canvas.copy()
    draw = ImageDraw.Draw(picture)
    short = min(picture.size)
    thickness = max(2, round(short / (180 if style == "solid" else 260)))
    for mark in reversed(marks):
        _draw_box(draw, mark.box, mark.colour, thickness, style)
    font_size = 13 if len(marks) > 2 * _CROWDED else max(13, min(22, round(short / 34)))
    _draw_labels(draw, picture.size, [mark for mark in marks if mark.text or mark.score], font_size)

    panel = Image.new("RGB", (max(picture.width, 300), picture.height + _HEADER), _PAPER)
    panel.paste(picture, ((panel.width - picture.width) // 2, _HEADER))
    draw = ImageDraw.Draw(panel)
    _draw_box(draw, (4, 9, 26, 25), "#ffffff", 2, style)
    text, font = legible(title, 17)
    text = wrapped(text, font, panel.width - 42, 1)[0]
    draw.text((36, _HEADER // 2), text, fill=_INK, font=font, anchor="lm")
    note, note_font = legible(note, 14)
    room = panel.width - 36 - font.getlength(text) - 24
    if note and room > 60:
        note = wrapped(note, note_font, room, 1)[0]
        draw.text((panel.width - 4, _HEADER // 2), note, fill=_FAINT_INK, font=note_font, anchor="rm")
    return panel


def _draw_box(draw: ImageDraw.ImageDraw, box: Rectangle, colour: str, thickness: int, style: str) -> None:
    """An outline in `colour` between two thin dark ones, so that it shows on any ground."""
    x1, y1, x2, y2 = box
    pattern = _LINES[style]
    if pattern is None:
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=thickness + 2)
        draw.rectangle(box, outline=colour, width=thickness)
        return
    dash, space = (round(length * thickness) for length in pattern)
    inset = thickness - 1
    sides = (
        ((x1, y1), (x2, y1), (0, inset)),
        ((x1, y2 - inset), (x2, y2 - inset), (0, inset)),
        ((x1, y1), (x1, y2), (inset, 0)),
        ((x2 - inset, y1), (x2 - inset, y2), (inset, 0)),
    )
    for grow, fill in ((1, "black"), (0, colour)):
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


def _draw_labels(draw: ImageDraw.ImageDraw, size: tuple[int, int], marks: Sequence[_Mark], font_size: int) -> None:
    pad = round(font_size * 0.3)
    widest = max(60, min(size[0] - 4, max(180, round(0.42 * size[0]))))
    labels: list[tuple[list[str], Font]] = []
    sizes = []
    for mark in marks:
        text, font = legible(mark.text, font_size)
        lines = wrapped(text, font, widest - 2 * pad, max_lines=3, tail=mark.score)
        labels.append((lines, font))
        line_width = math.ceil(max(font.getlength(line) for line in lines))
        sizes.append((line_width + 2 * pad, len(lines) * _line_height(font) + pad))
    places = place_labels(sizes, [mark.box for mark in marks], *size)
    for mark, place in zip(marks, places, strict=True):
        _draw_leader(draw, mark, place)
    for mark, (x1, y1, x2, y2), (lines, font) in zip(marks, places, labels, strict=True):
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=mark.colour, outline="black")
        for row, line in enumerate(lines):
            at = (x1 + pad, y1 + pad // 2 + row * _line_height(font))
            draw.text(at, line, fill=_ink_on(mark.colour), font=font)


def _draw_leader(draw: ImageDraw.ImageDraw, mark: _Mark, place: Rectangle) -> None:
    """A line from a label to its box, where they are apart."""
    start = tuple(min(max((place[axis] + place[axis + 2]) / 2, mark.box[axis]), mark.box[axis + 2]) for axis in (0, 1))
    end = tuple(min(max(start[axis], place[axis]), place[axis + 2]) for axis in (0, 1))
    if math.dist(start, end) > 3:
        draw.line((start, end), fill="black", width=4)
        draw.line((start, end), fill=mark.colour, width=2)


def _line_height(font: Font) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent


def _ink_on(colour: str) -> str:
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "white"


def _beside(panels: Sequence[Image.Image]) -> Image.Image:
    width = sum(panel.width for panel in panels) + _GAP * (len(panels) + 1)
    sheet = Image.new("RGB", (width, max(panel.height for panel in panels) + _GAP), _PAPER)
    x = _GAP
    for panel in panels:
        sheet.paste(panel, (x, 0))
        x += panel.width + _GAP
    return sheet
