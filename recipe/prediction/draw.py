"""Draw predictions for people: boxes, captions and scores next to the truth and the text answer."""

import contextlib
import math
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from recipe.images import open_image
from recipe.metrics.gather import normalized_caption
from recipe.schema import DetectedObject, Object, Prediction, Sample

_COLOURS = (
    "#ff453a", "#ff8c1a", "#ffd60a", "#b8f000", "#30d158", "#1fcfae", "#5fdcff", "#409cff", "#8f8dff", "#da6bff",
    "#ff5fa8", "#d19a5b", "#c4281c", "#b86a00", "#958500", "#5d8a00", "#0d8a45", "#00878a", "#0a74c4", "#4a55f0",
    "#9440d8", "#bd2f96", "#ffcfa8", "#f5ee9e", "#b4f5b0", "#a8f4ee", "#c3d6ff", "#f6c6f2")  # fmt: skip
_PAPER, _PLAIN, _GAP = "#181a1e", "#b0b0b0", 10
# Pillow's own font has little but ASCII; these are looked up by name among the system's fonts.
_WIDER_FONTS = (
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "NotoSans-Regular.ttf", "PingFang.ttc",
    "Arial Unicode.ttf", "msyh.ttc", "arial.ttf")  # fmt: skip
# The outline of each kind of box: dash and gap in line widths, and its entry in the legend.
_OUTLINES = {
    "teacher": (2.0, 2.5, "dotted: teacher, a solved example the model was shown"),
    "prediction": (1e4, 0.0, "solid: prediction, with its score"),
    "truth": (5.0, 3.0, "dashed: truth"),
    "text answer": (1e4, 0.0, "double: text answer of the language model"),
}

_Image = Image.Image
_Size = tuple[int, int]  # width, height
_Pixels = tuple[int, int, int, int]  # xyxy
_Mark = tuple[_Pixels, str, str, str]  # box on the panel, caption, score, colour


class CaptionColours(dict[str, str]):
    """A colour per caption: the one its letters choose, unless an earlier caption of the drawing has taken it."""

    def __missing__(self, caption: str) -> str:
        free = set(_COLOURS) - set(self.values()) or _COLOURS
        return self.setdefault(caption, min(free, key=lambda colour: sha256(f"{colour} {caption}".encode()).digest()))


class _Panel(NamedTuple):
    image: _Image  # in the size it is drawn in
    size: _Size  # of the image that the boxes refer to
    colours: CaptionColours
    kind: str = ""  # of _OUTLINES, or "" without boxes
    title: str = "image"
    objects: Sequence[DetectedObject | Object] = ()  # the first lie on top
    name: str = ""
    words: str = ""  # instead of the image


def draw_prediction(
    image: Image.Image,
    prediction: Prediction,
    truth: Sample | None = None,
    score_threshold: float = 0.3,
    teachers: Sequence[Sample] = (),
    with_head: bool = True,
) -> Image.Image:
    """Draw one sheet with panels for teachers, prediction, truth and text answer, and a legend.

    `image` is in the displayed orientation. Objects of the head below `score_threshold` are left out. An answer
    without boxes is shown in words. Small images are enlarged, large ones reduced. Equal captions have equal colours.
    """
    panels = _panels(image, prediction, truth, score_threshold, with_head)
    shortest = 480 if max(len(panel.objects) for panel in panels) < 16 else 800  # a crowd needs more room
    image = _resized(image, max(1.0, shortest / min(image.size)), 1600)
    columns, shown = min(len(teachers), 2), list[_Panel]()
    for number, teacher in enumerate(teachers[:4], start=1):
        example = open_image(teacher.image)
        scale = max(min(np.divide(image.size, example.size)) / columns, 240 / max(example.size))
        title = f"teacher {number}" + f" of {len(teachers)}" * (number == 4 < len(teachers))
        panel = _Panel(_resized(example, scale, 1600), example.size, panels[0].colours)
        shown.append(panel._replace(kind="teacher", title=title, objects=teacher.objects or (), name=teacher.id))
    return _sheet([(shown, columns)] * bool(shown) + [([panel._replace(image=image)], 1) for panel in panels], 16 / 9)


def draw_gallery(shown: Sequence[tuple[Sample, Prediction]], score_threshold: float) -> Image.Image:
    """Draw at least one prediction, each next to its truth and text answer, as small images on one sheet."""
    images = [_resized(open_image(sample.image), math.inf, 480) for sample, _ in shown]
    rows = [_panels(image, item[1], item[0], score_threshold) for image, item in zip(images, shown, strict=True)]
    return _sheet([(row, len(row)) for row in rows], 3 / 2)


def draw_sample(sample: Sample, longest: int) -> Image.Image:
    """Draw a sample of a data set with its boxes and captions, its longer side `longest` pixels.

    Raises:
        ValueError: Its image cannot be decoded.
    """
    image, objects = open_image(sample.image), sample.objects
    num_crowds = sum(item.iscrowd for item in objects or ())
    number = len(objects or ()) - num_crowds
    title = "not annotated" if objects is None else f"{number} object{'s' * (number != 1)}"
    title += f", {num_crowds} crowd region{'s' * (num_crowds != 1)}" * bool(num_crowds)
    panel = _Panel(_resized(image, longest / max(image.size), longest), image.size, CaptionColours(), "prediction")
    return _draw_panel(panel._replace(title=title, objects=objects or ()), 17)


def draw_samples(shown: Sequence[tuple[Image.Image, Sample, str]]) -> Image.Image:
    """Draw at least one image with the objects of its sample on one sheet, each headed by its text."""
    colours, panels = CaptionColours(), list[_Panel]()
    for image, sample, title in shown:
        panel = _Panel(_resized(image, math.inf, 480), (sample.width, sample.height), colours, title=title)
        panels.append(panel._replace(kind="truth", objects=sample.objects) if sample.objects is not None else panel)
    return _sheet([([panel], 1) for panel in panels], 3 / 2)


def _panels(
    image: _Image, prediction: Prediction, truth: Sample | None, least: float, with_head: bool = True
) -> list[_Panel]:
    """Return at least one panel; the first is headed by the image's name."""
    with_head = with_head and prediction.with_head
    found = [item for item in prediction.objects if item.score >= least] if with_head else None
    layers = {"prediction": found, "truth": truth and truth.objects, "text answer": prediction.answer_objects}
    plain, panels = _Panel(image, (prediction.width, prediction.height), CaptionColours()), list[_Panel]()
    for kind, objects in layers.items():
        if objects is not None:
            title = f"{kind}: {len(objects)} box{'es' * (len(objects) != 1)}"
            title += f" from {least:.2f}" * (kind == "prediction")
            panels.append(plain._replace(kind=kind, title=title, objects=objects))
    panels = panels or [plain]
    if prediction.answer is not None and prediction.answer_objects is None:
        panels.append(plain._replace(title="text answer: no boxes", words=prediction.answer.strip() or "(empty)"))
    return [panels[0]._replace(name=prediction.id), *panels[1:]]


def _resized(image: Image.Image, scale: float, longest: int) -> Image.Image:
    scale = min(scale, longest / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _sheet(blocks: Sequence[tuple[Sequence[_Panel], int]], aspect: float) -> Image.Image:
    """Draw blocks, each of panels and their columns, as large as a sheet of `aspect` (width / height) lets them be."""
    width = max(columns * max(panel.image.width for panel in block) for block, columns in blocks)
    height = max(-(-len(block) // columns) * max(panel.image.height for panel in block) for block, columns in blocks)
    rows = {columns: -(-len(blocks) // columns) for columns in range(1, len(blocks) + 1)}
    columns = max(rows, key=lambda columns: min(aspect / (columns * width), 1 / (rows[columns] * height)))
    size = min(max(17, round(columns * width / 110)), 32)  # of letters that can be read when the sheet fills a slide
    drawn = [_grid([_draw_panel(p, size) for p in block], number) for block, number in reversed(blocks)]
    sheet = _grid(drawn[::-1], columns)  # from the last, so that teachers take no colour from what the model says
    kinds = dict.fromkeys(panel.kind for block, _ in blocks for panel in block if panel.kind)
    words = "; ".join([*(_OUTLINES[kind][2] for kind in kinds), "equal captions have equal colours"])
    legend = [_text(words, round(0.9 * size), sheet.width, 5)] if kinds else []
    return ImageOps.expand(_grid([sheet, *legend], 1), (_GAP, 0, _GAP, _GAP), _PAPER)


def _grid(images: Sequence[_Image], columns: int, gap: int = _GAP) -> _Image:
    """Arrange images in rows, each column as wide as its widest image and each row as high as its highest."""
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    widths = [max(image.width for image in images[column::columns]) + gap for column in range(len(rows[0]))]
    heights = [max(image.height for image in row) + gap for row in rows]
    sheet = Image.new("RGB", (sum(widths) - gap, sum(heights) - gap), _PAPER)
    for number, image in enumerate(images):
        sheet.paste(image, (sum(widths[: number % columns]), sum(heights[: number // columns])))
    return sheet


def _draw_panel(panel: _Panel, size: int) -> _Image:
    """Draw a header above the image with its boxes and labels; captions too many for labels go below it."""
    title, letters, indent = _text(panel.title, size), round(0.8 * size), 2 * size if panel.kind else 0
    width, height = max(panel.image.width, indent + title.width + size, 10 * size), max(panel.image.height, 6 * size)
    header = Image.new("RGB", (width, 2 * size), _PAPER)
    header.paste(title, (indent, size - title.height // 2))
    if panel.kind:
        _draw_box(ImageDraw.Draw(header), (4, size // 2, 2 * size - 6, 3 * size // 2), "white", size // 7, panel.kind)
    if (room := width - indent - title.width) > 4 * size:
        name = _text(panel.name, letters, room)
        header.paste(name, (width - name.width, size - name.height // 2))
    if panel.words:
        return _grid([header, _text(panel.words, size, width, int(height / (1.5 * size)))], 1, 0)
    body = Image.new("RGB", (width, height), _PAPER)  # with margins if the image is too small for header or labels
    corner = (width - panel.image.width) // 2, (height - panel.image.height) // 2
    body.paste(panel.image, corner)
    draw = ImageDraw.Draw(body)
    marks = [_mark(item, panel, corner) for item in panel.objects]
    for box, _, _, colour in reversed(marks):
        _draw_box(draw, box, colour, max(2, round(size / 5)), panel.kind)
    marks = [mark for mark in marks if mark[1] or mark[2]]
    widest, area = max(0.42 * width, 9 * size), math.prod(panel.image.size)
    labels = [_text(caption, letters, widest, 3, score, colour) for _, caption, score, colour in marks]
    if sum(math.prod(label.size) for label in labels) > area / (4 if area > (20 * size) ** 2 else 8):
        return _grid([header, body, _captions(marks, width, letters)], 1, 0)
    places = _place_labels([label.size for label in labels], [box for box, *_ in marks], width, height)
    for (box, _, _, colour), label, place in zip(marks, labels, places, strict=True):
        start = np.clip(np.add(place, np.divide(label.size, 2)), box[:2], box[2:])
        end = np.clip(start, place, np.add(place, label.size))
        if math.dist(start, end) > 4:  # a line ties the label to its box
            draw.line((*start, *end), fill=_ink_on(colour), width=4)
            draw.line((*start, *end), fill=colour, width=2)
    for label, place in zip(labels, places, strict=True):
        body.paste(label, place)
    return _grid([header, body], 1, 0)


def _mark(item: DetectedObject | Object, panel: _Panel, corner: tuple[int, int]) -> _Mark:
    """Move an object to the image drawn at `corner`: inside it, and large enough to be seen."""
    limit = np.subtract(panel.image.size, 1)
    corners = np.nan_to_num(np.reshape(item.box, (2, 2)), posinf=0, neginf=0)
    low, high = np.sort(corners * panel.image.size / panel.size, axis=0).clip(0, limit)
    span = np.maximum(high - low, np.minimum(8, limit))
    start = np.clip((low + high - span) / 2, 0, limit - span) + corner
    x1, y1, x2, y2 = np.rint([*start, *(start + span)]).astype(int).tolist()
    if isinstance(item, Object) and item.iscrowd:
        return (x1, y1, x2, y2), f"{item.caption or 'objects'} (crowd)", "", _PLAIN
    score = f"{item.score:.2f}" if isinstance(item, DetectedObject) and panel.kind == "prediction" else ""
    return (x1, y1, x2, y2), item.caption, score, panel.colours[normalized_caption(item.caption)]


def _captions(marks: Sequence[_Mark], width: int, size: int) -> _Image:
    """Draw the captions in rows, the most frequent first, each with its number and range of scores."""
    scores, rows, gap = dict[tuple[str, str], list[str]](), [list[_Image]()], size // 3
    for _, caption, score, colour in marks:
        scores.setdefault((caption, colour), []).append(score)
    for (caption, colour), found in sorted(scores.items(), key=lambda item: (-len(item[1]), item[0])):
        tail = f"x {len(found)} " * (len(found) > 1) + "-".join(sorted({min(found), max(found)}))
        label = _text(caption, size, width, 1, tail, colour)
        if sum(other.width + gap for other in rows[-1]) + label.width > width:
            rows.append([])
        rows[-1].append(label)
    if num_left_out := sum(map(len, rows[6:])):
        rows[6:] = [[_text(f"and {num_left_out} more", size, width, colour=_PLAIN)]]
    return ImageOps.expand(_grid([_grid(row, len(row), gap) for row in rows], 1, gap), (0, gap), _PAPER)


def _draw_box(draw: ImageDraw.ImageDraw, box: _Pixels, colour: str, width: int, kind: str) -> None:
    """Draw the outline of a kind of box, with a dark or bright rim, so that it shows on any ground."""
    x1, y1, x2, y2 = box
    line = max(2, width // 2)
    width = 3 * line if kind == "text answer" else width
    dash, gap = (round(length * width) for length in _OUTLINES[kind][:2])
    right, bottom = x2 - width + 1, y2 - width + 1
    dashes = [(x, y, min(x + dash, x2), y + width - 1) for x in range(x1, x2 + 1, dash + gap) for y in (y1, bottom)]
    dashes += [(x, y, x + width - 1, min(y + dash, y2)) for y in range(y1, y2 + 1, dash + gap) for x in (x1, right)]
    for grow, fill in ((1, _ink_on(colour)), (0, colour)):
        for left, top, end_x, end_y in dashes:
            draw.rectangle((left - grow, top - grow, end_x + grow, end_y + grow), fill=fill)
    if kind == "text answer" and min(x2 - x1, y2 - y1) > 2 * line:
        draw.rectangle((x1 + line, y1 + line, x2 - line, y2 - line), outline=_ink_on(colour), width=line)


def _ink_on(colour: str) -> str:
    return "black" if np.dot(ImageColor.getrgb(colour)[:3], (0.299, 0.587, 0.114)) > 120 else "white"


def _place_labels(sizes: Sequence[_Size], boxes: Sequence[_Pixels], width: int, height: int) -> list[_Size]:
    """Return the corner of each label in turn: of all places on a grid, one near its box that hides little."""
    cell, corners = 4, list[_Size]()
    cost = np.zeros((height // cell, width // cell))  # of hiding each cell
    for x1, y1, x2, y2 in boxes:
        covered = cost[-(-y1 // cell) : y2 // cell + 1, -(-x1 // cell) : x2 // cell + 1]
        covered += 0.006 + 3.0 / max(covered.size, 1)  # a small box hidden is worse than a corner of a large one
    for (w, h), (x1, y1, x2, y2) in zip(sizes, boxes, strict=True):
        anchor_y = y1 - h - 1  # the first choice is above the box, at its left
        columns, rows = (x1 % cell + w - 1) // cell + 1, (anchor_y % cell + h - 1) // cell + 1
        sums = np.pad(cost, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
        hidden = sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns] + sums[:-rows, :-columns]
        left = np.arange(hidden.shape[1]) * cell + x1 % cell
        top = np.arange(hidden.shape[0])[:, None] * cell + anchor_y % cell
        off_x = 0.03 * np.maximum(np.maximum(x1 - left - w, left - x2), 0) + 0.001 * np.abs(left - x1)
        off_y = 0.03 * np.maximum(np.maximum(y1 - top - h, top - y2), 0) + 0.001 * np.abs(top - anchor_y)
        row, column = np.unravel_index(np.argmin(hidden + off_x + off_y), hidden.shape)
        cost[row : row + rows, column : column + columns] += 1.0
        corners.append((int(left[column]), int(top[row, 0])))
    return corners


def _text(text: str, size: int, width: float = math.inf, rows: int = 1, tail: str = "", colour: str = _PAPER) -> _Image:
    """Draw `text` on `colour` in rows of at most `width` pixels; dots replace what does not fit, never the `tail`."""
    pad, lines = round(0.3 * size), list[str]()
    text, font = _legible(f"{text[: 400 * rows]} {tail}", size)
    while text and len(lines) < rows:
        dots = f"... {tail}".rstrip() if len(lines) == rows - 1 and font.getlength(text) > width - 2 * pad else ""
        room = width - 2 * pad - font.getlength(dots)
        end = max(1, bisect_right(range(1, min(len(text), 400) + 1), room, key=lambda end: font.getlength(text[:end])))
        space = text.rfind(" ", 1, end + 1) if end < len(text) and not dots else -1
        line = text[: space if space > 0 else end]
        text = text[len(line) :].lstrip()
        lines.append(line.rstrip() + dots)
    longest, height = math.ceil(max(map(font.getlength, lines), default=0)), sum(font.getmetrics())
    drawn = Image.new("RGB", (longest + 2 * pad, len(lines) * height + pad), colour)
    draw = ImageDraw.Draw(drawn)
    draw.rectangle((0, 0, drawn.width - 1, drawn.height - 1), outline=_PAPER)
    for row, line in enumerate(lines):
        draw.text((pad, pad // 2 + row * height), line, fill=_ink_on(colour), font=font)
    return drawn


def _legible(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return `text` and the font here that has most of it; what it lacks loses its accent or becomes a code (u732b)."""
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
    font = max(_fonts(size), key=lambda font: sum(_has(font, letter) for letter in text))
    if all(_has(font, letter) for letter in text):
        return text, font
    letters: list[str] = []
    for letter in text:
        if unicodedata.category(letter) not in ("Mn", "Mc", "Cf"):  # marks of a letter that may be lacking
            plain = "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
            known = (form for form in (letter, plain) if form and all(_has(font, part) for part in form))
            letters.append(next(known, f"u{ord(letter):x} "))
    return "".join(letters), font


@lru_cache(maxsize=32)
def _fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    fonts = [ImageFont.load_default(size)]
    for name in _WIDER_FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    return [font for font in fonts if isinstance(font, ImageFont.FreeTypeFont)]


@lru_cache(maxsize=4096)
def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))  # which no font has
