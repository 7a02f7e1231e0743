"""`recipe.prediction.draw` and `recipe.prediction.draw_labels`."""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from recipe.prediction.draw import caption_colours, draw_gallery, draw_prediction
from recipe.prediction.draw_labels import legible, place_labels, wrapped
from recipe.prediction.draw_panel import Panel, draw_panel
from recipe.schema import Box, DetectedObject, Object, Prediction, Sample

GRAY = Image.new("RGB", (100, 60), (128, 128, 128))


def predicted(*objects: tuple[Box, float, str], answer_boxes: list[Box] | None = None) -> Prediction:
    found = tuple(DetectedObject(*item) for item in objects)
    if answer_boxes is None:
        return Prediction("sample", 100, 60, found)
    return Prediction("sample", 100, 60, found, "[...]", tuple(DetectedObject(box, 1.0, "cat") for box in answer_boxes))


def test_a_box_is_drawn_where_it_is():
    picture = np.asarray(draw_prediction(GRAY, predicted(((20, 30, 60, 50), 0.9, "cat"))))
    scale, left, top = 8, 10, 34  # 60 pixels become 480; the panel stands in a margin, under a header
    ground = np.abs(picture[top:, left : left + 800].astype(int) - 128).sum(2) == 0
    assert not ground[30 * scale : 50 * scale, 20 * scale].any()
    assert not ground[30 * scale : 50 * scale, 60 * scale].any()
    assert not ground[50 * scale, 20 * scale : 60 * scale].any()
    assert ground[35 * scale : 45 * scale, 25 * scale : 55 * scale].all()


@pytest.mark.parametrize(
    ("size", "panel"), [((140, 140), (480, 480)), ((640, 480), (640, 480)), ((4000, 3000), (1600, 1200))]
)
def test_small_pictures_grow_and_large_ones_shrink(size: tuple[int, int], panel: tuple[int, int]):
    drawn = draw_prediction(Image.new("RGB", size), Prediction("a", *size, ()))
    assert (drawn.width - 20, drawn.height - 44) == panel


def test_panels():
    prediction = predicted(((20, 30, 60, 50), 0.9, "cat"))
    truth = Sample("sample", b"", 100, 60, (Object((20, 30, 60, 50), "cat"), Object((0, 0, 9, 9), "", iscrowd=True)))
    alone = draw_prediction(GRAY, prediction)
    beside = draw_prediction(GRAY, prediction, truth)
    with_answer = draw_prediction(GRAY, predicted(answer_boxes=[(0, 0, 10, 10)]), truth)
    assert beside.width == with_answer.width == 2 * alone.width - 10
    assert with_answer.height > 2 * alone.height  # the answer in a second row
    not_annotated = Sample("sample", b"", 100, 60, None)
    assert draw_prediction(GRAY, prediction, not_annotated).size == alone.size


def sample(image: Image.Image, *objects: Object) -> Sample:
    data = BytesIO()
    image.save(data, "PNG")
    return Sample("sample", data.getvalue(), *image.size, objects)


def test_an_answer_without_boxes_is_written_out():
    def answered(words: str, with_head: bool = True) -> Image.Image:
        return draw_prediction(GRAY, Prediction("sample", 100, 60, (), words), with_head=with_head)

    yes, no = answered("Yes, two cats. " * 3), answered("No.")
    assert yes.size == no.size == (1630, 558)
    second = slice(34, 34 + 480), slice(820, 820 + 800)  # rows and columns of the second panel's picture
    assert (np.asarray(yes)[second] != np.asarray(no)[second]).any()
    assert np.asarray(no)[second].max(2).mean() < 40  # paper with a word on it, not the gray picture
    assert answered("word " * 5000).size == yes.size
    assert answered("").size == yes.size
    alone = np.asarray(answered("No.", with_head=False))  # beside the picture itself, and nothing for a legend to tell
    assert alone.shape == (34 + 480 + 10, 1630, 3)
    assert (alone[34 : 34 + 480, 10 : 10 + 800] == 128).all()


def test_teachers_stand_at_the_left_above_a_legend():
    teacher = sample(GRAY, Object((20, 30, 60, 50), "cat"))
    prediction = predicted(((20, 30, 60, 50), 0.9, "cat"))
    alone, taught = draw_prediction(GRAY, prediction), draw_prediction(GRAY, prediction, teachers=[teacher])
    legend = 34
    assert (taught.width, taught.height) == (2 * alone.width - 10, alone.height + legend)
    column = np.asarray(taught.crop((10, 34, 810, 34 + 480)))
    vivid = column.max(2).astype(int) - column.min(2) > 60
    assert vivid[250:450, 155:165].any()
    assert not vivid[:, 600:].any()
    many = [draw_prediction(GRAY, prediction, teachers=[teacher] * number) for number in (4, 5, 6)]
    assert many[0].tobytes() != many[1].tobytes() != many[2].tobytes()  # "teacher 4 of 6"
    assert many[0].size == many[1].size == many[2].size  # four are drawn


def test_the_sheet_comes_near_to_a_slide():
    """Four panels of a broad picture in two rows, of a high one in one; letters grow with the sheet."""
    for size, shape in (((768, 514), (2, 2)), ((300, 900), (4, 1))):
        image = Image.new("RGB", size)
        truth = sample(image, Object((20, 30, 60, 50), "cat"))
        prediction = Prediction("sample", *size, (), "[]", ())
        drawn = draw_prediction(image, prediction, truth, teachers=[truth])
        scale = max(1, 480 / min(size))
        assert (drawn.width // round(size[0] * scale), drawn.height // round(size[1] * scale)) == shape


def test_letters_are_one_size_and_grow_with_the_sheet(monkeypatch: pytest.MonkeyPatch):
    sizes: list[tuple[int, int]] = []

    def recorded(panel: Panel, title_size: int, label_size: int) -> Image.Image:
        sizes.append((title_size, label_size))
        return draw_panel(panel, title_size, label_size)

    monkeypatch.setattr("recipe.prediction.draw.draw_panel", recorded)
    many = [((x, y, x + 8.0, y + 8.0), 0.9, "cat") for x in range(0, 90, 9) for y in (0, 20, 40)]
    truth = sample(GRAY, Object((20, 30, 60, 50), "cat"))
    drawn = draw_prediction(GRAY, predicted(*many, answer_boxes=[(9, 9, 90, 50)]), truth, teachers=[truth, truth])
    assert len(sizes) == 5
    assert len(set(sizes)) == 1
    assert drawn.width / 120 < sizes[0][0] < drawn.width / 100
    alone = sizes.pop()
    draw_prediction(GRAY, predicted(many[0]))
    assert sizes[-1][0] < alone[0]


@pytest.mark.parametrize("num_teachers", [0, 1])
def test_the_legend_of_a_narrow_sheet_is_whole(num_teachers: int):
    """Below a narrow sheet it has more rows, and as many pixels of ink as in the one row below a wide sheet."""

    def legend(width: int) -> np.ndarray:
        image = Image.new("RGB", (width, 1600))
        answer = None if num_teachers else ()
        prediction = Prediction("a", *image.size, (), None if answer is None else "[]", answer)
        teachers = [sample(image)] * num_teachers
        drawn = draw_prediction(image, prediction, None, 0.3, teachers)
        below_panels = drawn.crop((0, 34 + 1600 + 10, *drawn.size))
        return (np.asarray(below_panels) != np.asarray((24, 26, 30))).any(2)

    wide, narrow = legend(700), legend(200)
    assert (len(wide), len(narrow) % 34) == (34, 0)
    assert len(narrow) > 34
    assert narrow.sum() == wide.sum()
    assert not narrow[:, -10:].any()
    assert not narrow[::34].any()
    assert not narrow[33::34].any()


def test_the_head_is_left_out_where_it_was_not_asked():
    both = predicted(((20, 30, 60, 50), 0.9, "cat"), answer_boxes=[(0, 0, 10, 10)])
    text = draw_prediction(GRAY, both, with_head=False)
    assert text.size == (820, 524)
    assert draw_prediction(GRAY, both).width == 2 * 820 - 10
    no_boxes = predicted(answer_boxes=[(0, 0, 10, 10)])
    assert text.tobytes() == draw_prediction(GRAY, no_boxes, with_head=False).tobytes()


def test_objects_below_the_threshold_are_not_drawn():
    weak = predicted(((20, 30, 60, 50), 0.29, "cat"))
    assert draw_prediction(GRAY, weak).tobytes() == draw_prediction(GRAY, predicted()).tobytes()
    assert draw_prediction(GRAY, weak, score_threshold=0.2).tobytes() != draw_prediction(GRAY, predicted()).tobytes()


def test_a_caption_keeps_its_colour():
    def vivid(*objects: tuple[Box, float, str]) -> set[tuple[int, ...]]:
        drawn = draw_prediction(GRAY, predicted(*objects))
        counted = drawn.getcolors(maxcolors=1 << 24) or []
        wide = {colour for count, colour in counted if count > 2000 and isinstance(colour, tuple)}
        return {colour for colour in wide if max(colour) - min(colour) > 60}

    cat, dog = ((20.0, 30.0, 60.0, 50.0), 0.9, "cat"), ((70.0, 10.0, 90.0, 20.0), 0.8, "dog")
    assert len(vivid(cat)) == 1
    assert vivid(cat) == vivid((cat[0], 0.5, " CAT "))
    assert vivid(cat) | vivid(dog) == vivid(cat, dog)
    assert len(vivid(cat, dog)) == 2


def test_nearly_every_caption_has_one_colour_in_all_pictures():
    """Pictures with five captions of a hundred: no two captions of one share a colour, few ever change theirs."""
    captions = [f"a {what} {how}" for what in "abcdefghij" for how in "0123456789"]
    generator = np.random.default_rng(0)
    same = []
    for _ in range(200):
        shown = generator.choice(captions, 5, replace=False).tolist()
        colours = caption_colours(shown)
        assert len(set(colours.values())) == 5
        assert colours == caption_colours(reversed(shown))
        same += [colours[caption] == caption_colours([caption])[caption] for caption in shown]
        taught = caption_colours(shown[:2], shown)  # teachers change no colour of what the model says
        assert taught.items() >= caption_colours(shown[:2]).items()
    assert np.mean(same) > 0.9
    assert len(caption_colours(captions)) == 100


def test_drawing_is_deterministic_and_leaves_the_picture_alone():
    image = GRAY.copy()
    prediction = predicted(((20, 30, 60, 50), 0.9, "cat"), ((22, 30, 60, 52), 0.8, "dog"))
    assert draw_prediction(image, prediction).tobytes() == draw_prediction(image, prediction).tobytes()
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
        ((20, 30, 60, 50), 0.9, ""),
        ((20, 30, 60, 50), 0.9, "long caption " * 200),
        ((20, 30, 60, 50), 0.9, "x" * 3000),
        ((20, 30, 60, 50), 0.9, "größe кошка 猫と犬 \U0001f431 e\u0301 \u202e مرحبا"),
        ((20, 30, 60, 50), 0.9, "line\nbreak\ttab\x00nul"),
    ],
)
def test_odd_boxes_and_captions(found: tuple[Box, float, str]):
    assert draw_prediction(GRAY, predicted(found)).size == (820, 524)


@pytest.mark.parametrize("size", [(1, 1), (4000, 10), (10, 4000)])
def test_odd_pictures(size: tuple[int, int]):
    prediction = Prediction("a", *size, (DetectedObject((0, 0, 1, 1), 0.9, "a cat"),))
    drawn = draw_prediction(Image.new("RGB", size), prediction)
    assert max(drawn.size) <= 1700


def test_labels_stay_inside_and_apart():
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 900, (15, 2))
    boxes = [(x, y, x + 60, y + 60) for x, y in corners.tolist()]
    places = np.asarray(place_labels([(90, 20)] * 15, boxes, 1000, 1000))
    assert places[:, :2].min() >= 0
    assert places[:, 2:].max() <= 1000
    low = np.maximum(places[:, None, :2], places[None, :, :2])
    high = np.minimum(places[:, None, 2:], places[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    assert (shared - np.diag(np.diag(shared))).max() == 0


def test_a_label_goes_above_its_box_or_where_there_is_room():
    assert place_labels([(50, 20)], [(100, 100, 200, 200)], 400, 400) == [(100, 79, 150, 99)]
    below = place_labels([(50, 20)], [(100, 0, 200, 100)], 400, 400)[0]
    assert below[1] >= 100
    assert place_labels([(50, 20)], [(0, 0, 400, 400)], 400, 400) == [(0, 0, 50, 20)]
    assert place_labels([], [], 10, 10) == []
    wider_than_canvas = place_labels([(50, 20)], [(0, 0, 10, 10)], 10, 10)[0]
    assert wider_than_canvas[:2] == (0, 0)


def test_labels_of_one_crowded_spot_do_not_cover_each_other():
    boxes = [(100.0 + shift, 100.0 + shift, 140.0 + shift, 140.0 + shift) for shift in range(6)]
    places = place_labels([(80, 20)] * 6, boxes, 500, 500)
    for index, (x1, y1, x2, y2) in enumerate(places):
        for left, top, right, bottom in places[:index]:
            assert x2 <= left or right <= x1 or y2 <= top or bottom <= y1


def test_lines_fit_and_the_score_is_kept():
    _, font = legible("x", 16)
    lines = wrapped("a rather long caption about a cat " * 10, font, 120, 3, tail="0.93")
    assert len(lines) == 3
    assert max(font.getlength(line) for line in lines) <= 120
    assert lines[-1].endswith("... 0.93")
    broken = wrapped("i" * 3000, font, 120, 5)
    assert len(broken) == 5
    assert 110 < font.getlength(broken[0]) <= 120
    assert wrapped("cat", font, 120, 3, tail="0.93") == ["cat 0.93"]
    assert wrapped("", font, 120, 3, tail="0.93") == ["0.93"]


def test_letters_no_font_has_are_written_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recipe.prediction.draw_labels._WIDER_FONTS", ())
    text, font = legible("é\u200d 猫", 19)  # a size no other test has cached fonts for
    assert text == "e u732b "
    assert font.getlength(text) > 0


@pytest.mark.parametrize("num_panels", [1, 2, 3])
def test_a_gallery_has_one_legend_and_a_handy_shape(num_panels: int, monkeypatch: pytest.MonkeyPatch):
    legends: list[Sequence[str]] = []

    def recorded(kinds: Sequence[str], width: int, size: int) -> Image.Image:
        legends.append(kinds)
        return Image.new("RGB", (width, 10))

    monkeypatch.setattr("recipe.prediction.draw._legend", recorded)
    prediction = predicted(((20, 30, 60, 50), 0.9, "cat"), answer_boxes=[(0, 0, 10, 10)] if num_panels == 3 else None)
    truth = sample(GRAY, Object((20, 30, 60, 50), "cat"))
    if num_panels == 1:
        truth = replace(truth, objects=None)
    drawn = draw_gallery([(truth, prediction)] * 8, 0.3)
    assert legends == [["prediction", "truth", "text answer"][:num_panels]]
    assert 1 < drawn.width / drawn.height < 2.3
    assert drawn.width < 3200
