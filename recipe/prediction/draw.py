"""Pictures of predictions for people: boxes, captions and scores beside the truth and the text answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from PIL import Image, ImageDraw, ImageOps

from recipe.images import open_image
from recipe.prediction.draw_labels import legible
from recipe.prediction.draw_layout import PAPER, best_columns, flow, grid
from recipe.prediction.draw_panel import INK, PLAIN, STYLES, Mark, Panel, draw_panel, draw_pattern, drawable_box
from recipe.schema import DetectedObject, Object, Prediction, Sample

_COLOURS = (
    "#ff453a", "#ff8c1a", "#ffd60a", "#b8f000", "#30d158", "#1fcfae", "#5fdcff",
    "#409cff", "#8f8dff", "#da6bff", "#ff5fa8", "#d19a5b", "#c4281c", "#b86a00",
    "#958500", "#5d8a00", "#0d8a45", "#00878a", "#0a74c4", "#4a55f0", "#9440d8",
    "#bd2f96", "#ffcfa8", "#f5ee9e", "#b4f5b0", "#a8f4ee", "#c3d6ff", "#f6c6f2",
)  # fmt: skip
_GAP = 10
_CROWDED = 16  # boxes from which on a picture is drawn larger
_MOST_TEACHERS = 4  # drawn; the others are counted
_SLIDE, _GALLERY = 16 / 9, 3 / 2  # width over height that a sheet comes near to
_GALLERY_SIDE = 480  # longest side of a picture of a gallery
_LEGEND = {
    "teacher": "teacher: a solved example the model was shown",
    "prediction": "prediction, with its score",
    "truth": "truth",
    "text answer": "text answer of the language model",
}

_Objects = Sequence[DetectedObject | Object]


@dataclass(frozen=True)
class _Block:
    """Panels that stay together on a sheet."""

    panels: Sequence[Panel]
    columns: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """In pixels, without headers."""
        rows = -(-len(self.panels) // self.columns)
        sizes = [panel.picture.size for panel in self.panels]
        return self.columns * max(width for width, _ in sizes), rows * max(height for _, height in sizes)


def draw_prediction(
    image: Image.Image,
    prediction: Prediction,
    truth: Sample | None = None,
    score_threshold: float = 0.3,
    teachers: Sequence[Sample] = (),
    with_head: bool = True,
) -> Image.Image:
    """Draws what the model says of a picture, for a slide: panels teachers, prediction, truth, text answer; a legend.

    Small pictures are enlarged, very large ones reduced. A caption has the same colour in every panel, and in nearly
    every drawing.

    Args:
        image: RGB, in the displayed orientation (`recipe.images.open_image`).
        prediction: Objects below `score_threshold` are left out. The answer's panel is drawn where there is an answer:
            its boxes, or its words where it has none.
        truth: The sample, for the truth's panel; left out where it is None or not annotated.
        score_threshold: Least score of a drawn object.
        teachers: The solved examples the model was shown, with their pictures.
        with_head: Draw the head's panel; False where it was not asked.
    """
    shown = teachers[:_MOST_TEACHERS]
    layers = _layers(prediction, truth, score_threshold, with_head)
    colours = caption_colours(
        [item.caption for items in layers.values() for item in items],
        [item.caption for teacher in shown for item in teacher.objects or ()],
    )
    most = max((len(items) for items in layers.values()), default=0)
    shortest = 480 if most < _CROWDED else 800
    picture = _resized(image, max(1.0, shortest / min(image.size)), 1600)
    blocks = [_Block([panel]) for panel in _panels(picture, prediction, layers, score_threshold, colours)]
    if shown:
        blocks.insert(0, _teachers(shown, len(teachers), picture.size, colours))
    return _sheet(blocks, best_columns(len(blocks), blocks[-1].size, _SLIDE))


def draw_gallery(shown: Sequence[tuple[Sample, Prediction]], score_threshold: float) -> Image.Image:
    """Draws several predictions, each beside its truth and text answer, on one sheet of small pictures.

    Args:
        shown: The samples with their pictures, and what the model says of them; at least one.
        score_threshold: Least score of a drawn object.
    """
    blocks: list[_Block] = []
    for sample, prediction in shown:
        layers = _layers(prediction, sample, score_threshold)
        colours = caption_colours(item.caption for items in layers.values() for item in items)
        image = open_image(sample.image)
        picture = _resized(image, _GALLERY_SIDE / max(image.size), _GALLERY_SIDE)
        panels = _panels(picture, prediction, layers, score_threshold, colours)
        blocks.append(_Block(panels, len(panels)))
    size = max(block.size[0] for block in blocks), max(block.size[1] for block in blocks)
    return _sheet(blocks, best_columns(len(blocks), size, _GALLERY))


def _layers(
    prediction: Prediction, truth: Sample | None, score_threshold: float, with_head: bool = True
) -> dict[str, _Objects]:
    """The objects to draw, by the kind of their panel."""
    layers: dict[str, _Objects] = {}
    if with_head:
        layers["prediction"] = [item for item in prediction.objects if item.score >= score_threshold]
    if truth is not None and truth.objects is not None:
        layers["truth"] = truth.objects
    if prediction.answer_objects is not None:
        layers["text answer"] = prediction.answer_objects
    return layers


def _panels(
    picture: Image.Image,
    prediction: Prediction,
    layers: Mapping[str, _Objects],
    score_threshold: float,
    colours: Mapping[str, str],
) -> list[Panel]:
    """A panel a layer, and one of the answer's words where it has no boxes; the first tells the picture's name."""
    size = prediction.width, prediction.height
    panels: list[Panel] = []
    for kind, items in layers.items():
        title = f"{kind}: {_count(len(items), 'object' if kind == 'truth' else 'box')}"
        if kind == "prediction":
            title += f" from {score_threshold:.2f}"
        panels.append(Panel(picture, kind, title, marks=_marks(items, kind, size, picture.size, colours)))
    if prediction.answer is not None and prediction.answer_objects is None:
        panels = panels or [Panel(picture, "", "picture")]
        panels.append(Panel(picture, "", "text answer: no boxes", words=prediction.answer.strip() or "(empty)"))
    return [replace(panel, note="" if number else prediction.id) for number, panel in enumerate(panels)]


def _teachers(teachers: Sequence[Sample], number: int, size: tuple[int, int], colours: Mapping[str, str]) -> _Block:
    """The solved examples that are drawn of `number`, together about as large as one picture of `size`."""
    largest = max(teacher.width for teacher in teachers), max(teacher.height for teacher in teachers)
    columns = best_columns(len(teachers), largest, size[0] / size[1])
    rows = -(-len(teachers) // columns)
    limit = max(240, size[0] // columns), max(240, round((1 if rows == 1 else 0.85) * size[1] / rows))
    panels: list[Panel] = []
    for position, teacher in enumerate(teachers, start=1):
        image = open_image(teacher.image)
        picture = _resized(image, min(limit[0] / image.width, limit[1] / image.height), max(limit))
        more = f" of {number}" if position == len(teachers) < number else ""
        marks = _marks(teacher.objects or (), "teacher", image.size, picture.size, colours)
        panels.append(Panel(picture, "teacher", f"teacher {position}{more}", teacher.id, marks))
    return _Block(panels, columns)


def _marks(
    items: _Objects, kind: str, size: tuple[int, int], drawn_size: tuple[int, int], colours: Mapping[str, str]
) -> list[Mark]:
    """The objects of a picture of `size`, in pixels of the drawn one."""
    scale = drawn_size[0] / size[0], drawn_size[1] / size[1]
    marks: list[Mark] = []
    for item in items:
        box = drawable_box(item.box, *scale, drawn_size)
        if isinstance(item, Object) and item.iscrowd:
            marks.append(Mark(box, f"{item.caption or 'objects'} (crowd)", "", PLAIN))
        else:
            score = f"{item.score:.2f}" if kind == "prediction" and isinstance(item, DetectedObject) else ""
            marks.append(Mark(box, item.caption, score, colours[_key(item.caption)]))
    return marks


def _key(caption: str) -> str:
    return caption.strip().casefold()


def caption_colours(*groups: Iterable[str]) -> dict[str, str]:
    """A colour a caption: the one that its letters choose, unless a caption before it in this picture has taken it.

    Captions choose in the order of the groups, and of the alphabet within a group.
    """
    colours: dict[str, str] = {}
    free = set[str](_COLOURS)
    for group in groups:
        for caption in sorted({_key(caption) for caption in group} - colours.keys()):
            free = free or set[str](_COLOURS)
            colours[caption] = min(free, key=lambda colour: sha256(f"{colour} {caption}".encode()).digest())
            free.remove(colours[caption])
    return colours


def _count(number: int, noun: str) -> str:
    return f"{number} {noun if number == 1 else noun + ('es' if noun.endswith('x') else 's')}"


def _resized(image: Image.Image, scale: float, longest: int) -> Image.Image:
    """`image` times `scale`, or less, so that no side is longer than `longest`."""
    scale = min(scale, longest / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _sheet(blocks: Sequence[_Block], columns: int) -> Image.Image:
    """All panels in letters that are read when the sheet fills a slide, labels in one size, above the legend."""
    panels = [panel for block in blocks for panel in block.panels]
    width = min(columns, len(blocks)) * max(block.size[0] for block in blocks)
    title_size = max(17, round(width / 110))
    room = max(min(panel.picture.size) for panel in panels) / (30 + max(len(panel.marks) for panel in panels) / 2)
    label_size = min(title_size, max(13, round(width / 150), round(room)))
    drawn = [
        grid([draw_panel(panel, title_size, label_size) for panel in block.panels], block.columns, _GAP)
        for block in blocks
    ]
    sheet = ImageOps.expand(grid(drawn, columns, _GAP), (_GAP, 0, _GAP, _GAP), PAPER)
    kinds = list(dict.fromkeys(panel.kind for panel in panels if panel.kind in STYLES and not panel.words))
    if len(panels) == 1 or not kinds:
        return sheet
    return grid([sheet, _legend(kinds, sheet.width, title_size)], 1, 0)


def _legend(kinds: Sequence[str], width: int, size: int) -> Image.Image:
    """What tells the lines of the boxes apart: one row, more where the sheet is narrow."""
    font = legible("", round(0.9 * size))[1]
    entries = [*((_LEGEND[kind], STYLES[kind]) for kind in kinds), ("equal captions have equal colours", "")]
    indents = [round(2.4 * size) if style else 0 for _, style in entries]
    widths = [indent + font.getlength(text) for (text, _), indent in zip(entries, indents, strict=True)]
    places = flow(widths, width - 3 * _GAP, 2 * size)
    height = 2 * size
    legend = Image.new("RGB", (width, (places[-1][1] + 1) * height), PAPER)
    draw = ImageDraw.Draw(legend)
    for (text, style), indent, (x, row) in zip(entries, indents, places, strict=True):
        left, middle = x + 1.5 * _GAP, (row + 0.5) * height
        if style:
            draw_pattern(draw, left, middle, size, style)
        draw.text((left + indent, middle), text, fill=INK, font=font, anchor="lm")
    return legend
