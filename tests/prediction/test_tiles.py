"""`recipe/prediction/tiles.py`: every pixel is in a tile, every object is kept once."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from recipe.images import open_image
from recipe.prediction.tiles import Tile, cut, merge_tiles, tiles_of
from recipe.schema import Box, DetectedObject, Prediction


def test_tiles_by_hand():
    assert tiles_of(100, 80, 100, 0.2) == []
    # 300 wide, steps of at most 80: 0, 67, 133, 200; the height has room for one tile alone.
    assert tiles_of(300, 60, 100, 0.2) == [(x, 0, x + 100, 60) for x in (0, 67, 133, 200)]
    assert tiles_of(200, 200, 100, 0) == [
        (0, 0, 100, 100),
        (100, 0, 200, 100),
        (0, 100, 100, 200),
        (100, 100, 200, 200),
    ]
    assert tiles_of(101, 100, 100, 0.2) == [(0, 0, 100, 100), (1, 0, 101, 100)]


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.2, 0.5, 0.9])
def test_tiles_cover_the_image_and_overlap_as_asked(overlap: float):
    rng = np.random.default_rng(0)
    for _ in range(100):
        width, height, side = (int(value) for value in rng.integers(1, (400, 400, 150)))
        seen = np.zeros((height, width), dtype=bool)
        tiles = tiles_of(width, height, side, overlap)
        for x1, y1, x2, y2 in tiles:
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            assert (x2 - x1, y2 - y1) == (min(side, width), min(side, height))
            seen[y1:y2, x1:x2] = True
        assert seen.all() == bool(tiles) == (max(width, height) > side)
        for axis in (0, 1):
            starts = sorted({tile[axis] for tile in tiles})
            assert all(later - earlier <= max(1, side * (1 - overlap)) for earlier, later in pairwise(starts))


def test_a_tile_has_the_pixels_of_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    tile = open_image(cut(Image.fromarray(pixels), (10, 20, 40, 45)))
    assert (np.asarray(tile) == pixels[20:45, 10:40]).all()


def made(*objects: tuple[Box, float, str], size: tuple[int, int] = (100, 100)) -> Prediction:
    return Prediction("x", *size, tuple(DetectedObject(*item) for item in objects), answer="the whole")


def merged(whole: Prediction, *found: tuple[Tile, Prediction]) -> list[tuple[Box, float, str]]:
    result = merge_tiles(whole, found, score_threshold=0.3, least_score=0.05, iou=0.5)
    assert (result.answer, result.width, result.height) == ("the whole", whole.width, whole.height)
    return [(item.box, item.score, item.caption) for item in result.objects]


LEFT, RIGHT = (0, 0, 100, 100), (80, 0, 180, 100)


def test_objects_are_moved_into_the_image_and_sorted():
    whole = made(size=(180, 100))
    assert merged(whole, (LEFT, made(((5, 5, 20, 20), 0.5, "a"))), (RIGHT, made(((40, 5, 60, 20), 0.6, "b")))) == [
        ((120, 5, 140, 20), 0.6, "b"),
        ((5, 5, 20, 20), 0.5, "a"),
    ]


def test_an_object_in_two_tiles_is_kept_once():
    """At x 82 to 98 of the image, whole in both tiles; the better score stays."""
    found = [(LEFT, made(((82, 40, 97, 60), 0.5, "left"))), (RIGHT, made(((3, 40, 18, 60), 0.9, "right")))]
    assert merged(made(size=(180, 100)), *found) == [((83, 40, 98, 60), 0.9, "right")]


def test_a_cut_box_gives_way_to_the_whole_object_even_with_a_better_score():
    """From 50 to 97 of the image; the right tile shows it from 80 on, whose IoU with the whole is 17 / 47."""
    whole_object, part = ((50, 40, 97, 60), 0.5, "a long bar"), ((0, 40, 17, 60), 0.9, "a bar")
    found = [(LEFT, made(whole_object)), (RIGHT, made(part))]
    assert merged(made(size=(180, 100)), *found) == [whole_object]
    # The image's own edge cuts nothing: at the top of the image the same holds.
    at_the_top, part = ((50, 0, 97, 20), 0.5, "a long bar"), ((0, 0, 17, 20), 0.9, "a bar")
    assert merged(made(size=(180, 100)), (LEFT, made(at_the_top)), (RIGHT, made(part))) == [at_the_top]


def test_a_cut_box_is_not_replaced_by_one_below_the_threshold():
    """That one would have no caption."""
    found = [(LEFT, made(((50, 40, 97, 60), 0.2, ""))), (RIGHT, made(((0, 40, 17, 60), 0.9, "a bar")))]
    assert merged(made(size=(180, 100)), *found) == [((80, 40, 97, 60), 0.9, "a bar")]


def test_an_object_larger_than_a_tile_comes_from_the_whole_image():
    whole = made(((10, 10, 170, 90), 0.4, "a table"), size=(180, 100))
    found = [(LEFT, made(((10, 10, 100, 90), 0.8, "left"))), (RIGHT, made(((0, 10, 90, 90), 0.7, "right")))]
    assert merged(whole, *found) == [((10, 10, 170, 90), 0.4, "a table")]


def test_what_lies_on_a_large_object_stays():
    whole = made(((10, 10, 170, 90), 0.4, "a table"), size=(180, 100))
    cup = ((85, 40, 95, 50), 0.9, "a cup")
    assert merged(whole, (LEFT, made(cup))) == [cup, ((10, 10, 170, 90), 0.4, "a table")]


def test_boxes_of_one_tile_are_left_as_they_are():
    """A crowd: two objects that overlap by .8."""
    crowd = made(((10, 10, 50, 50), 0.9, "one"), ((14, 10, 54, 50), 0.8, "other"))
    assert len(merged(made(size=(180, 100)), (LEFT, crowd))) == 2


def test_low_scores_are_left_out_and_nothing_is_fine():
    assert merged(made(size=(180, 100)), (LEFT, made(((5, 5, 20, 20), 0.04, "")))) == []
    assert merged(made(size=(180, 100)), (LEFT, made(((5, 5, 20, 20), 0.05, "")))) == [((5, 5, 20, 20), 0.05, "")]
