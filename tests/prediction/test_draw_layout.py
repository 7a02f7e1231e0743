"""`recipe.prediction.draw_layout`."""

import pytest
from PIL import Image, ImageColor

from recipe.prediction.draw_layout import best_columns, flow, grid


def test_grid():
    pictures = [Image.new("RGB", size, colour) for size, colour in [((30, 10), "red"), ((20, 40), "lime")]]
    pictures.append(Image.new("RGB", (50, 5), "blue"))
    sheet = grid(pictures, columns=2, gap=20)
    assert sheet.size == (50 + 20 + 20, 40 + 20 + 5)
    assert sheet.getpixel((0, 0)) == ImageColor.getrgb("red")
    assert sheet.getpixel((70, 0)) == ImageColor.getrgb("lime")
    assert sheet.getpixel((0, 60)) == ImageColor.getrgb("blue")
    assert grid(pictures[:1], columns=4, gap=20).size == (30, 10)
    for wrong in ([], 1), (pictures, 0):
        with pytest.raises(ValueError, match="at least 1"):
            grid(*wrong, gap=0)


@pytest.mark.parametrize(
    ("number", "size", "columns"),
    [(1, (3, 2), 1), (2, (3, 2), 2), (3, (3, 2), 2), (4, (3, 2), 2), (4, (2, 3), 4), (2, (9, 1), 1), (8, (1, 1), 4)],
)
def test_columns_in_which_pictures_are_largest_on_a_slide(number: int, size: tuple[int, int], columns: int):
    assert best_columns(number, size, 16 / 9) == columns


def test_flow():
    assert flow([40, 40, 40, 200, 10], 100, 10) == [(0, 0), (50, 0), (0, 1), (0, 2), (0, 3)]
    assert flow([], 100, 10) == []
