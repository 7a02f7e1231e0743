"""`recipe.prediction.draw`: what a person sees on a drawn sheet."""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

import recipe.prediction.draw
from recipe.prediction.draw import CaptionColours, draw_gallery, draw_prediction
from recipe.schema import Box, DetectedObject, Object, Prediction, Sample

GRAY = Image.new("RGB", (100, 60), (128, 128, 128))
LEFT, HEADER = 10, 34  # of the first panel's image, for letters of the smallest size
CAT: tuple[Box, float, str] = ((20, 30, 60, 50), 0.9, "cat")


def predicted(*objects: tuple[Box, float, str], answer_boxes: list[Box] | None = None) -> Prediction:
    found = tuple(DetectedObject(*item) for item in objects)
    if answer_boxes is None:
        return Prediction("sample", 100, 60, found)
    return Prediction("sample", 100, 60, found, "[...]", tuple(DetectedObject(box, 1.0, "cat") for box in answer_boxes))


def sample(image: Image.Image, *objects: Object) -> Sample:
    data = BytesIO()
    image.save(data, "PNG")
    return Sample("sample", data.getvalue(), *image.size, objects)


def crowd(number: int, caption: str = "pawn", score: float = 0.9) -> list[tuple[Box, float, str]]:
    return [((10.0 * place, 50.0, 10.0 * place + 8, 58.0), score, caption) for place in range(number)]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, float]]:
    """Every line that is drawn after this: its words, the size of its letters, its width in pixels."""
    lines: list[tuple[str, float, float]] = []
    draw_text = ImageDraw.ImageDraw.text

    def recorded(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, fill: str, font) -> None:
        lines.append((text, font.size, font.getlength(text)))
        draw_text(self, xy, text, fill=fill, font=font)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    return lines


def words(lines: Sequence[tuple[str, float, float]]) -> list[str]:
    return [text for text, _, _ in lines]


def colours_of(drawn: Image.Image) -> set[str]:
    """The captions' colours on a sheet."""
    shown = {colour for _, colour in drawn.getcolors(maxcolors=1 << 24) or []}
    return {colour for colour in recipe.prediction.draw._COLOURS if ImageColor.getrgb(colour) in shown}


def pixels(drawn: Image.Image, colour: str) -> np.ndarray:
    return (np.asarray(drawn) == ImageColor.getrgb(colour)).all(2)


def test_a_box_is_drawn_where_it_is():
    drawn = np.asarray(draw_prediction(GRAY, predicted(CAT)))
    scale = 8  # 60 pixels become 480
    ground = np.abs(drawn[HEADER:, LEFT : LEFT + 800].astype(int) - 128).sum(2) == 0
    assert not ground[30 * scale : 50 * scale, 20 * scale].any()
    assert not ground[30 * scale : 50 * scale, 60 * scale].any()
    assert not ground[50 * scale, 20 * scale : 60 * scale].any()
    assert ground[35 * scale : 45 * scale, 25 * scale : 55 * scale].all()


@pytest.mark.parametrize(
    ("size", "panel"), [((140, 140), (480, 480)), ((640, 480), (640, 480)), ((4000, 3000), (1600, 1200))]
)
def test_small_images_grow_and_large_ones_shrink(size: tuple[int, int], panel: tuple[int, int]):
    drawn = np.asarray(draw_prediction(Image.new("RGB", size, (0, 90, 0)), Prediction("a", *size, ())))
    rows, columns = np.nonzero((drawn == (0, 90, 0)).all(2))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == panel


def test_a_crowd_has_more_room():
    few, many = (draw_prediction(GRAY, predicted(*[CAT] * number)) for number in (15, 16))
    assert many.width > 1.5 * few.width


def test_panels():
    prediction = predicted(CAT)
    truth = Sample("sample", b"", 100, 60, (Object((20, 30, 60, 50), "cat"), Object((0, 0, 9, 9), "", iscrowd=True)))
    alone = draw_prediction(GRAY, prediction)
    beside = draw_prediction(GRAY, prediction, truth)
    with_answer = draw_prediction(GRAY, predicted(answer_boxes=[(0, 0, 10, 10)]), truth)
    assert beside.width == with_answer.width == 2 * alone.width - 10
    assert beside.height == alone.height
    assert with_answer.height > 1.8 * alone.height  # the answer in a second row
    not_annotated = Sample("sample", b"", 100, 60, None)
    assert draw_prediction(GRAY, prediction, not_annotated).size == alone.size


def test_what_is_written(written: list[tuple[str, float, float]]):
    truth = Sample("s", b"", 100, 60, (Object((20, 30, 60, 50), "cat"), Object((0, 0, 9, 9), "", iscrowd=True)))
    draw_prediction(GRAY, predicted(CAT, answer_boxes=[(0, 0, 10, 10)]), truth, 0.25, [sample(GRAY)])
    shown = words(written)
    titles = {"teacher 1", "prediction: 1 box from 0.25", "sample", "truth: 2 boxes", "text answer: 1 box"}
    assert titles <= set(shown)
    assert {"cat", "cat 0.90", "objects (crowd)"} <= set(shown)  # a score for the head's boxes alone
    legend = shown[-1]
    assert [word in legend for word in ("dotted: teacher", "solid: pred", "dashed: truth", "double: text")] == [
        True
    ] * 4
    assert shown.count("cat") == 2


def test_an_answer_without_boxes_is_written_out(written: list[tuple[str, float, float]]):
    def answered(answer: str, with_head: bool = True) -> Image.Image:
        written.clear()
        return draw_prediction(GRAY, Prediction("sample", 100, 60, (), answer), with_head=with_head)

    yes = answered("Yes, two cats. " * 3)
    assert "Yes, two cats. Yes, two cats. Yes, two cats." in words(written)
    no = answered("No.")
    assert yes.size == no.size
    second = slice(HEADER, HEADER + 480), slice(820, 820 + 800)  # rows and columns of the second panel
    assert np.asarray(no)[second].max(2).mean() < 40  # paper with a word on it, not the gray image
    assert answered("word " * 5000).size == yes.size
    assert any(text.endswith("...") for text in words(written))
    assert answered("").size == yes.size
    assert "(empty)" in words(written)
    alone = np.asarray(answered("No.", with_head=False))  # next to the image itself, and nothing for a legend to say
    assert alone.shape == (HEADER + 480 + 10, 1630, 3)
    assert (alone[HEADER : HEADER + 480, 10 : 10 + 800] == 128).all()


def test_teachers_stand_at_the_left(written: list[tuple[str, float, float]]):
    teacher = sample(GRAY, Object((20, 30, 60, 50), "cat"))
    alone, taught = draw_prediction(GRAY, predicted()), draw_prediction(GRAY, predicted(), teachers=[teacher])
    assert (taught.width, taught.height) == (2 * alone.width - 10, alone.height)
    (columns,) = np.nonzero(pixels(taught, CaptionColours()["cat"]).any(0))
    assert columns.min() == LEFT + 160  # of one that is as large as the prediction's image
    assert columns.max() < 800
    written.clear()
    many = [draw_prediction(GRAY, predicted(), teachers=[teacher] * number) for number in (4, 5, 6)]
    assert many[0].size == many[1].size == many[2].size  # four are drawn
    assert [words(written).count(f"teacher 4{of}") for of in ("", " of 5", " of 6")] == [1, 1, 1]
    assert many[0].width < 1.1 * taught.width  # together about as large as the prediction's image


def test_the_sheet_comes_close_to_a_slide():
    """Four panels of a broad image in two rows, of a high one in one."""
    for size, shape in (((768, 514), (2, 2)), ((300, 900), (4, 1))):
        image = Image.new("RGB", size)
        truth = sample(image, Object((20, 30, 60, 50), "cat"))
        prediction = Prediction("sample", *size, (), "[]", ())
        drawn = draw_prediction(image, prediction, truth, teachers=[truth])
        scale = max(1, 480 / min(size))
        assert (drawn.width // round(size[0] * scale), drawn.height // round(size[1] * scale)) == shape


def test_letters_are_one_size_and_grow_with_the_sheet(written: list[tuple[str, float, float]]):
    many = [((x, y, x + 8.0, y + 8.0), 0.9, "cat") for x in range(0, 90, 9) for y in (0, 20, 40)]
    truth = sample(GRAY, Object((20, 30, 60, 50), "cat"))
    drawn = draw_prediction(GRAY, predicted(*many, answer_boxes=[(9, 9, 90, 50)]), truth, teachers=[truth, truth])
    titles = {size for text, size, _ in written if ":" in text and ";" not in text}
    labels = {size for text, size, _ in written if text.startswith("cat")}
    assert len(titles) == len(labels) == 1
    assert drawn.width / 120 < min(titles) < drawn.width / 100
    assert 0.7 < min(labels) / min(titles) < 0.9
    written.clear()
    draw_prediction(GRAY, predicted(many[0]))
    assert max(size for _, size, _ in written) < min(titles)


def test_the_legend_of_a_narrow_sheet_is_whole(written: list[tuple[str, float, float]]):
    """Below a narrow sheet it has more lines."""

    def legend(width: int) -> list[str]:
        image = Image.new("RGB", (width, 1600))
        written.clear()
        drawn = draw_prediction(image, Prediction("a", *image.size, (), "[]", ()), teachers=[sample(image)])
        lines = written[[text.startswith("dotted") for text in words(written)].index(True) :]
        assert max(width for *_, width in lines) < drawn.width - 20
        return words(lines)

    wide, narrow = legend(800), legend(200)
    assert len(wide) < len(narrow)
    assert " ".join(wide) == " ".join(narrow)
    assert narrow[-1].endswith("equal colours")


def test_the_head_is_left_out_if_it_was_not_asked():
    both = predicted(CAT, answer_boxes=[(0, 0, 10, 10)])
    text = draw_prediction(GRAY, both, with_head=False)
    assert draw_prediction(GRAY, both).width == 2 * text.width - 10
    no_boxes = predicted(answer_boxes=[(0, 0, 10, 10)])
    assert text.tobytes() == draw_prediction(GRAY, no_boxes, with_head=False).tobytes()


def test_objects_below_the_threshold_are_not_drawn():
    weak = predicted((CAT[0], 0.29, "cat"))
    assert draw_prediction(GRAY, weak).tobytes() == draw_prediction(GRAY, predicted()).tobytes()
    assert draw_prediction(GRAY, weak, score_threshold=0.2).tobytes() != draw_prediction(GRAY, predicted()).tobytes()


def test_a_caption_keeps_its_colour():
    dog = ((70.0, 10.0, 90.0, 20.0), 0.8, "dog")
    cat = colours_of(draw_prediction(GRAY, predicted(CAT)))
    assert len(cat) == 1
    assert cat == colours_of(draw_prediction(GRAY, predicted((CAT[0], 0.5, " CAT "))))
    both = colours_of(draw_prediction(GRAY, predicted(CAT, dog)))
    assert both == cat | colours_of(draw_prediction(GRAY, predicted(dog)))
    assert len(both) == 2
    truth = Sample("sample", b"", 100, 60, (Object((0, 0, 50, 50), "Cat"),))
    assert colours_of(draw_prediction(GRAY, predicted(CAT, answer_boxes=[(0, 0, 9, 9)]), truth)) == cat
    assert colours_of(draw_prediction(GRAY, predicted(CAT), teachers=[sample(GRAY, Object(CAT[0], "cat"))])) == cat


def test_teachers_change_no_colour_of_what_the_model_says():
    """Captions that want the colour of the prediction's take another."""
    prediction = predicted(CAT)
    rivals = [f"cat {number}" for number in range(200)]
    rivals = [caption for caption in rivals if CaptionColours()[caption] == CaptionColours()["cat"]][:3]
    assert rivals
    teacher = sample(GRAY, *(Object((10, 10, 40, 40), caption) for caption in rivals))
    panel = LEFT + 810, HEADER, LEFT + 1610, HEADER + 480
    drawn = draw_prediction(GRAY, prediction, teachers=[teacher]).crop(panel)
    assert colours_of(drawn) == colours_of(draw_prediction(GRAY, prediction))


def test_nearly_every_caption_has_one_colour_in_all_images():
    """Images with five captions of a hundred: no two captions of one share a colour, few ever change theirs."""
    captions = [f"a {what} {how}" for what in "abcdefghij" for how in "0123456789"]
    generator = np.random.default_rng(0)
    same = []
    for _ in range(200):
        colours = CaptionColours()
        shown = {caption: colours[caption] for caption in generator.choice(captions, 5, replace=False).tolist()}
        assert len(set(shown.values())) == 5
        assert shown == {caption: colours[caption] for caption in shown}
        same += [colour == CaptionColours()[caption] for caption, colour in shown.items()]
    assert np.mean(same) > 0.9
    colours = CaptionColours()
    assert len({colours[caption] for caption in captions}) == len(
        recipe.prediction.draw._COLOURS
    )  # all, before any twice


def test_drawing_is_deterministic_and_leaves_the_image_alone():
    image = GRAY.copy()
    prediction = predicted(CAT, ((22, 30, 60, 52), 0.8, "dog"))
    assert draw_prediction(image, prediction).tobytes() == draw_prediction(image, prediction).tobytes()
    answer = Prediction("sample", 100, 60, (), "No.")  # no panel has boxes but the teacher's
    taught = [[sample(GRAY, Object(CAT[0], caption))] for caption in ("cat", "dog", "cat")]
    drawn = [draw_prediction(image, answer, None, 0.3, teachers, False).tobytes() for teachers in taught]
    assert drawn[0] == drawn[2] != drawn[1]
    assert image.tobytes() == GRAY.tobytes()


@pytest.mark.parametrize(
    "found",
    [
        ((5, 5, 6, 6), 0.9, "dot"),
        ((99, 59, 100, 60), 0.9, "corner"),
        ((30, 30, 30, 30), 0.9, "point"),
        ((60, 50, 20, 10), 0.9, "inverted"),
        ((-50, -50, 900, 900), 0.9, "outside"),
        ((300, 300, 400, 400), 0.9, "far outside"),
        ((float("nan"), 0, float("inf"), 5), 0.9, "not finite"),
        (CAT[0], 0.9, ""),
        (CAT[0], 0.9, "long caption " * 200),
        (CAT[0], 0.9, "x" * 3000),
        (CAT[0], 0.9, "größe кошка 猫と犬 \U0001f431 e\u0301 \u202e مرحبا कुत्ता"),
        (CAT[0], 0.9, "line\nbreak\ttab\x00nul"),
    ],
)
@pytest.mark.parametrize("kind", ["prediction", "truth", "text answer", "teacher"])
def test_odd_boxes_and_captions(found: tuple[Box, float, str], kind: str):
    """Something is seen of every box."""
    truth = sample(GRAY, Object(found[0], found[2]))
    if kind == "prediction":
        drawn = draw_prediction(GRAY, predicted(found))
    elif kind == "text answer":
        answer = (DetectedObject(found[0], 1.0, found[2]),)
        drawn = draw_prediction(GRAY, Prediction("a", 100, 60, (), "[]", answer), with_head=False)
    elif kind == "truth":
        drawn = draw_prediction(GRAY, predicted(), truth)
    else:
        drawn = draw_prediction(GRAY, predicted(), teachers=[truth])
    assert drawn.width == (820 if kind in ("prediction", "text answer") else 1630)
    assert pixels(drawn, CaptionColours()[found[2].strip().casefold()]).sum() > 30


@pytest.mark.parametrize(
    ("box", "seen"),  # in pixels of the drawn image, eight times as large
    [
        ((50, 30, 50, 30), (396, 236, 404, 244)),  # a point is enlarged
        ((99.9, 59.9, 100, 60), (791, 471, 799, 479)),
        ((-50, -50, 900, 900), (0, 0, 799, 479)),
        ((50, -50, 900, 20), (400, 0, 799, 160)),
    ],
)
def test_a_box_is_drawn_inside_the_image_and_without_a_caption_has_no_label(box: Box, seen: Box):
    drawn = draw_prediction(GRAY, predicted(), Sample("s", b"", 100, 60, (Object(box, ""),)))
    rows, columns = np.nonzero(pixels(drawn, CaptionColours()[""]))
    corners = columns.min(), rows.min(), columns.max(), rows.max()
    assert np.subtract(corners, (LEFT + 810, HEADER) * 2).tolist() == list(seen)


@pytest.mark.parametrize("size", [(1, 1), (4000, 10), (10, 4000)])
def test_odd_images(size: tuple[int, int]):
    item = DetectedObject((0, 0, 1, 1), 0.9, "a cat")
    prediction = Prediction("a", *size, (item,), "[]", (item,))
    image = Image.new("RGB", size)
    truth = sample(image, Object((0, 0, 1, 1), "a cat"))
    for drawn in (draw_prediction(image, prediction, truth, 0.3, [truth]), draw_gallery([(truth, prediction)], 0.3)):
        assert pixels(drawn, CaptionColours()["a cat"]).sum() > 100
        assert max(drawn.size) <= 4 * 1700


def placed(sizes: list[tuple[int, int]], boxes: list[tuple[int, int, int, int]], side: int) -> np.ndarray:
    """Return xyxy of every label."""
    corners = np.asarray(recipe.prediction.draw._place_labels(sizes, boxes, side, side))
    return np.concatenate([corners, corners + sizes], axis=1)


def most_shared(places: np.ndarray) -> int:
    low = np.maximum(places[:, None, :2], places[None, :, :2])
    high = np.minimum(places[:, None, 2:], places[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    return (shared - np.diag(np.diag(shared))).max()


@pytest.mark.parametrize("seed", range(5))
def test_labels_stay_inside_and_apart(seed: int):
    corners = np.random.default_rng(seed).integers(0, 940, (40, 2)).tolist()
    places = placed([(90, 20)] * 40, [(x, y, x + 60, y + 60) for x, y in corners], 1000)
    assert places.min() >= 0
    assert places.max() <= 1000
    assert most_shared(places) == 0


def test_a_label_goes_above_its_box_or_to_another_place_next_to_it():
    assert placed([(50, 20)], [(100, 100, 200, 200)], 400).tolist() == [[100, 79, 150, 99]]
    (below,) = placed([(50, 20)], [(100, 0, 200, 100)], 400).tolist()
    assert 95 <= below[1] <= 110 or below[2] <= 105 or below[0] >= 195  # not on the box
    assert placed([(50, 20)], [(0, 0, 399, 399)], 400).min() < 5  # on it, in a corner
    neighbours = [(100, 100, 200, 200), (100, 70, 160, 99)]  # the second stands where the first one's label would
    first = placed([(50, 20)] * 2, neighbours, 400)[0]
    assert first[3] <= 70 or first[1] >= 99 or first[2] <= 100 or first[0] >= 160


def test_labels_of_one_crowded_spot_do_not_cover_each_other():
    boxes = [(100 + shift, 100 + shift, 140 + shift, 140 + shift) for shift in range(6)]
    places = placed([(80, 20)] * 6, boxes, 500)
    assert most_shared(places) == 0
    assert np.abs(places.mean(0) - 125).max() < 80  # and stay close


def test_a_label_far_from_its_box_is_tied_to_it_by_a_line():
    """Fourteen boxes cover the middle of a white image, and a small one in it."""
    found = [*[((0, 200, 800, 400), 0.9, "wall")] * 14, ((380, 290, 420, 310), 0.5, "dot")]
    image = Image.new("RGB", (800, 600), "white")
    prediction = Prediction("a", 800, 600, tuple(DetectedObject(*item) for item in found))
    dot = pixels(draw_prediction(image, prediction), CaptionColours()["dot"])[HEADER:, LEFT:]
    line = dot[210:285] if dot[:200].any() else dot[315:390]  # from the box to the label in the free part
    assert line.any(1).all()
    assert line.sum(1).max() <= 4


def test_lines_fit_and_the_score_is_kept(written: list[tuple[str, float, float]]):
    draw_prediction(GRAY, predicted((CAT[0], 0.93, "a rather long caption about a cat " * 10)))
    lines = [(text, width) for text, _, width in written if "long" in text or text.endswith("0.93")]
    assert len(lines) == 3
    assert max(width for _, width in lines) <= 0.42 * 800
    assert lines[-1][0].endswith("... 0.93")
    written.clear()
    draw_prediction(GRAY, predicted((CAT[0], 0.93, "i" * 3000)))
    lines = [(text, width) for text, _, width in written if "iii" in text]
    assert len(lines) == 3
    assert all(0.4 * 800 < width <= 0.42 * 800 for _, width in lines)
    assert lines[-1][0].endswith("... 0.93")


def test_letters_no_font_has_are_written_out(monkeypatch: pytest.MonkeyPatch, written: list[tuple[str, float, float]]):
    monkeypatch.setattr("recipe.prediction.draw._WIDER_FONTS", ())
    recipe.prediction.draw._fonts.cache_clear()
    draw_prediction(GRAY, predicted((CAT[0], 0.9, "e\u0301\u00e9\u200d 猫 \u0915\u0941")))
    recipe.prediction.draw._fonts.cache_clear()
    assert "ee u732b  u915  0.90" in words(written)


@pytest.mark.parametrize("num_panels", [1, 2, 3])
def test_a_gallery_has_one_legend_and_a_handy_shape(num_panels: int, written: list[tuple[str, float, float]]):
    prediction = predicted(CAT, answer_boxes=[(0, 0, 10, 10)] if num_panels == 3 else None)
    truth = sample(GRAY, Object((20, 30, 60, 50), "cat"))
    if num_panels == 1:
        truth = replace(truth, objects=None)
    drawn = draw_gallery([(truth, prediction)] * 8, 0.3)
    legend = "solid: prediction, with its score; dashed: truth; double: text answer of the language model; "
    legend = legend[: [35, 50, len(legend)][num_panels - 1]]
    assert [text for text in words(written) if ";" in text] == [legend + "equal captions have equal colours"]
    assert sum(text.startswith("prediction: 1 box") for text in words(written)) == 8
    assert 1 < drawn.width / drawn.height < 2.3
    assert drawn.width < 3200


@pytest.mark.parametrize("width", [2, 3, 5])
def test_every_kind_of_box_looks_different(width: int):
    drawn: list[np.ndarray] = []
    for kind in recipe.prediction.draw._OUTLINES:
        image = Image.new("RGB", (80, 60), (128, 128, 128))
        recipe.prediction.draw._draw_box(ImageDraw.Draw(image), (10, 10, 70, 50), "#ff0000", width, kind)
        drawn.append(pixels(image, "#ff0000"))
    assert len(drawn) == 4
    for first, second in combinations(drawn, 2):
        assert (first != second).mean() > 0.01


def test_truth_is_dashed_and_prediction_solid():
    truth = Sample("sample", b"", 100, 60, (Object((10, 10, 90, 50), "cat"),))
    drawn = draw_prediction(GRAY, predicted(((10, 10, 90, 50), 0.9, "cat")), truth)
    colour = pixels(drawn, CaptionColours()["cat"])
    left_sides = [colour[HEADER + 85 : HEADER + 395, start + 80 : start + 82].any(1) for start in (LEFT, LEFT + 810)]
    assert left_sides[0].all()
    assert 0.4 < left_sides[1].mean() < 0.8
    assert np.abs(np.diff(left_sides[1].astype(int))).sum() > 10


def test_outlines_are_thick_enough_to_be_seen():
    drawn = draw_prediction(GRAY, predicted(((10, 10, 90, 50), 0.9, "cat"), answer_boxes=[(10, 10, 90, 50)]))
    across = pixels(drawn, CaptionColours()["cat"])[HEADER + 240]
    solid, double = (across[start + 60 : start + 100].tolist() for start in (LEFT, LEFT + 810))
    assert solid == [False] * 20 + [True] * 3 + [False] * 17
    assert double == [False] * 20 + [True] * 2 + [False] * 2 + [True] * 2 + [False] * 14


def test_an_outline_shows_on_its_own_colour():
    for colour in recipe.prediction.draw._COLOURS:
        image = Image.new("RGB", (80, 60), colour)
        recipe.prediction.draw._draw_box(ImageDraw.Draw(image), (10, 10, 70, 50), colour, 3, "prediction")
        rim = [ink for _, ink in image.getcolors() or [] if ink in ((0, 0, 0), (255, 255, 255))]
        assert len(rim) == 1


def test_a_small_image_with_many_boxes_has_its_captions_below(written: list[tuple[str, float, float]]):
    image = Image.new("RGB", (480, 320), (128, 128, 128))

    def gallery(number: int) -> Image.Image:
        written.clear()
        found = tuple(DetectedObject(box, 0.9, "pawn") for box, *_ in crowd(number))
        return draw_gallery([(replace(sample(image), objects=None), Prediction("a", 480, 320, found))], 0.3)

    few, many = gallery(5), gallery(28)
    assert "pawn x 28 0.90" in words(written)
    assert many.height > few.height + 13
    colour = pixels(many, CaptionColours()["pawn"])
    assert colour[HEADER : HEADER + 320].sum() < 28 * 9 * 9  # the boxes, no grounds of labels
    assert colour[HEADER + 320 :].sum() > 500


def test_captions_below_are_counted_with_their_scores(written: list[tuple[str, float, float]]):
    found = [*crowd(28), *crowd(1, score=0.35), *crowd(1, "king", 0.5), *crowd(2, "queen")]
    prediction = Prediction("a", 480, 320, tuple(DetectedObject(*item) for item in found))
    shown = replace(sample(Image.new("RGB", (480, 320))), objects=None)
    draw_gallery([(shown, prediction)], 0.3)
    assert words(written)[-4:-1] == ["pawn x 29 0.35-0.90", "queen x 2 0.90", "king 0.50"]
    written.clear()
    found = tuple(DetectedObject((1, 1, 9, 9), 0.9, f"piece {number:02d}") for number in range(90))
    drawn = draw_gallery([(shown, Prediction("a", 480, 320, found))], 0.3)
    below = words(written)[-2]
    assert below.startswith("and ") and below.endswith(" more")
    assert 40 < int(below.split()[1]) < 80
    assert drawn.height < HEADER + 320 + 8 * 25 + HEADER + 20


def test_a_label_reaches_into_the_margin_of_a_narrow_image():
    image = Image.new("RGB", (50, 1600), (128, 128, 128))
    prediction = Prediction("a", 50, 1600, (DetectedObject((5, 100, 45, 300), 0.93, "bishop"),))
    drawn = draw_prediction(image, prediction)
    (rows,) = np.nonzero(pixels(drawn, CaptionColours()["bishop"]).sum(1) > 55)  # of the label: broader than the image
    assert len(rows) > 2
    broad = Image.new("RGB", (600, 1600), (128, 128, 128))
    whole = draw_prediction(broad, replace(prediction, width=600))
    label = [pixels(each, CaptionColours()["bishop"]).sum() for each in (drawn, whole)]
    assert abs(int(label[0]) - int(label[1])) < 100  # nothing of it is cut off


def test_a_long_label_fits_into_the_margins_of_a_narrow_teacher(written: list[tuple[str, float, float]]):
    image = Image.new("RGB", (100, 1600), (128, 128, 128))
    caption = "a bishop in white that stands at the left"
    teacher = sample(image, Object((5, 100, 45, 300), caption))
    draw_prediction(image, Prediction("a", 100, 1600, ()), teachers=[teacher])
    assert " ".join(text for text in words(written) if text in caption) == caption


def test_a_low_image_has_room_for_a_label():
    image = Image.new("RGB", (400, 4), (128, 128, 128))
    drawn = draw_prediction(image, Prediction("a", 400, 4, (DetectedObject((0, 0, 8, 3), 0.93, "cat"),)))
    assert drawn.height >= HEADER + 90
    assert pixels(drawn, CaptionColours()["cat"]).sum() > 500
