"""`recipe.prediction.draw_panel`."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from recipe.prediction.draw_panel import STYLES, Mark, Panel, draw_box, draw_panel

RED = "#ff0000"


def gray(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def crowd(number: int, text: str = "pawn", score: str = "") -> list[Mark]:
    return [Mark((10.0 * place, 50.0, 10.0 * place + 8, 58.0), text, score, RED) for place in range(number)]


def reds(picture: Image.Image) -> np.ndarray:
    return (np.asarray(picture) == ImageColor.getrgb(RED)).all(2)


@pytest.mark.parametrize("thickness", [2, 3, 5])
def test_every_style_looks_different(thickness: int):
    drawn: list[np.ndarray] = []
    for style in STYLES.values():
        picture = gray(80, 60)
        draw_box(ImageDraw.Draw(picture), (10, 10, 70, 50), RED, thickness, style)
        drawn.append(reds(picture))
    assert len(drawn) == 4
    for first, second in combinations(drawn, 2):
        assert (first != second).mean() > 0.01


def test_a_small_picture_with_many_boxes_has_its_captions_beneath():
    few, many = (draw_panel(Panel(gray(300, 200), "teacher", "t", "", crowd(n)), 17, 13) for n in (1, 28))
    assert few.height == 34 + 200
    assert many.height > few.height + 13
    assert reds(many)[34 : 34 + 200].sum() < 28 * 9 * 9  # the boxes, no grounds of labels
    assert reds(many)[34 + 200 :].sum() > 500
    large = draw_panel(Panel(gray(1200, 800), "truth", "t", "", crowd(28)), 17, 13)
    assert large.height == 34 + 800


def test_captions_beneath_are_counted_with_their_scores(monkeypatch: pytest.MonkeyPatch):
    written: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, **_: written.append(text))
    marks = [*crowd(28, "pawn", "0.90"), *crowd(1, "pawn", "0.35"), *crowd(1, "king", "0.50"), *crowd(2, "queen")]
    draw_panel(Panel(gray(300, 200), "prediction", "title", "", marks), 17, 13)
    assert written == ["title", "pawn x 29 0.35-0.90", "queen x 2", "king 0.50"]
    written.clear()
    marks = [mark for number in range(60) for mark in crowd(1, f"piece {number:02d}")]
    panel = draw_panel(Panel(gray(300, 200), "teacher", "title", "", marks), 17, 13)
    assert written[1] == "piece 00"
    assert written[-1] == f"and {60 - (len(written) - 2)} more"
    assert panel.height < 34 + 200 + 8 * 25


def test_a_label_reaches_into_the_margin_of_a_narrow_picture():
    panel = draw_panel(
        Panel(gray(50, 480), "prediction", "t", "", [Mark((5, 100, 45, 300), "bishop", "0.93", RED)]), 17, 15
    )
    assert panel.width == 180
    ground = reds(panel)
    assert ground[:, :65].any() or ground[:, 115:].any()
    (rows,) = np.nonzero(ground.sum(1) > 60)  # of the label: broader than the picture
    assert len(rows) > 2
    whole = draw_panel(
        Panel(gray(300, 480), "prediction", "t", "", [Mark((130, 100, 170, 300), "bishop", "0.93", RED)]), 17, 15
    )
    assert abs(int(ground.sum()) - int(reds(whole).sum())) < 50  # nothing of it is cut off


def test_a_low_picture_has_room_for_a_label():
    panel = draw_panel(Panel(gray(400, 4), "prediction", "t", "", [Mark((0, 0, 8, 3), "cat", "0.93", RED)]), 17, 15)
    assert panel.height >= 34 + 90
