"""Drawn images: boxes are where their pixels are, texts stay true, and a draw depends on nothing but its place."""

from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from recipe.config import AugmentConfig, ColourConfig, CropConfig, WordsConfig
from recipe.data.augment import (
    NUM_WORDS,
    Augmentation,
    Drawn,
    Moves,
    Shown,
    draw_shown,
    is_kept,
    largest_sides,
    move_boxes,
    moves_of,
)
from recipe.data.encode import Encoder
from recipe.data.image import resized_size, shown_pixels
from recipe.data.maker import ExampleMaker
from recipe.data.teachers import Purpose, random_words
from recipe.data.words import Vocabulary
from recipe.schema import ImageSpec, Object, Sample

SPEC = ImageSpec(14, 2, 784, 60000, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
EVERYTHING = AugmentConfig(
    horizontal_flip=0.5, crop=CropConfig(probability=0.8), scale_jitter=[0.5, 1.5], colour=ColourConfig()
)
WORDS = Vocabulary(["en"], WordsConfig())


def augmentation(config: AugmentConfig) -> Augmentation:
    return Augmentation.of(config, SPEC, 3)


def shown(crop: tuple[int, int, int, int], flip: bool, size: tuple[int, int]) -> Shown:
    return Shown(np.array([crop]), np.array([flip]), np.array([size]))


def move(box: tuple[float, ...], *how: Any) -> tuple[list[float], float, bool]:
    boxes, seen, cut = move_boxes(np.array([box]), shown(*how), np.zeros(1, dtype=np.int64))
    return boxes[0].tolist(), float(seen[0]), bool(cut[0])


def test_boxes_worked_by_hand():
    """Of an image of 100 x 80."""
    box = (20.0, 10.0, 60.0, 50.0)
    assert move(box, (0, 0, 100, 80), False, (100, 80)) == ([20, 10, 60, 50], 1.0, False)
    assert move(box, (0, 0, 100, 80), True, (100, 80)) == ([40, 10, 80, 50], 1.0, False)
    assert move(box, (10, 10, 90, 50), False, (160, 80)) == ([20, 0, 100, 80], 1.0, False)
    assert move(box, (10, 10, 90, 50), True, (160, 80)) == ([60, 0, 140, 80], 1.0, False)
    assert move(box, (40, 0, 100, 80), False, (60, 80)) == ([0, 10, 20, 50], 0.5, True)
    assert move(box, (50, 30, 100, 80), True, (100, 100)) == ([80, 0, 100, 40], 0.125, True)
    assert move(box, (70, 0, 100, 80), False, (30, 80))[1:] == (0.0, True)


def test_boxes_are_those_of_torchvision():
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(200):
        width, height = rng.integers(30, 400, 2).tolist()
        corners = np.sort(rng.uniform(0, 1, (5, 2, 2)), axis=1) * (width, height)
        boxes = corners.reshape(5, 4)
        left, top = rng.integers(0, width - 10), rng.integers(0, height - 10)
        right, bottom = rng.integers(left + 5, width + 1), rng.integers(top + 5, height + 1)
        size = tuple(rng.integers(20, 500, 2).tolist())
        flip = bool(rng.integers(2))
        theirs: Any = BoundingBoxes(
            torch.from_numpy(boxes),
            format=BoundingBoxFormat.XYXY,
            canvas_size=(height, width),  # pyright: ignore
        )
        theirs = F.resize(F.crop(theirs, top, left, bottom - top, right - left), [size[1], size[0]])
        theirs = F.horizontal_flip(theirs) if flip else theirs
        how = shown((int(left), int(top), int(right), int(bottom)), flip, size)
        ours, _, _ = move_boxes(boxes, how, np.zeros(5, dtype=np.int64))
        worst = max(worst, float(np.abs(ours - theirs.numpy()).max()))
    assert worst <= 1e-9  # pixels; measured: 0.0


def rectangle(box: tuple[int, int, int, int], width: int, height: int) -> Sample:
    """A white rectangle on black."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    x1, y1, x2, y2 = map(float, box)
    return Sample("rectangle", stream.getvalue(), width, height, (Object((x1, y1, x2, y2), "white rectangle"),))


def edges(line: torch.Tensor) -> tuple[float, float]:
    """Where a bright stretch begins and ends, in parts of a pixel."""
    weights = line.double() / 255
    length = weights.sum()
    centre = ((torch.arange(len(line)) + 0.5) * weights).sum() / length
    return float(centre - length / 2), float(centre + length / 2)


def test_pixels_are_where_the_boxes_say():
    worst, looks = 0.0, set()
    for number in range(150):
        rng = np.random.default_rng(number)
        width, height = rng.integers(60, 400, 2).tolist()
        x1, y1 = int(rng.integers(2, width - 35)), int(rng.integers(2, height - 35))
        x2, y2 = int(rng.integers(x1 + 20, width - 2)), int(rng.integers(y1 + 20, height - 2))
        sample = rectangle((x1, y1, x2, y2), width, height)
        config = replace(EVERYTHING, colour=None)
        other, _, (how,) = augmentation(config).show(sample, [], 0, number)
        assert how is not None and other.objects is not None
        looks.add((how.flip, how.crop == (0, 0, width, height)))
        pixels = shown_pixels(sample.image, SPEC, how)[0]
        rows, columns = pixels.shape
        assert (columns, rows) == resized_size(other.width, other.height, SPEC)
        left, top, right, bottom = (
            value * scale
            for value, scale in zip(other.objects[0].box, (columns / other.width, rows / other.height) * 2, strict=True)
        )
        found = (*edges(pixels[int((top + bottom) / 2)]), *edges(pixels[:, int((left + right) / 2)]))
        worst = max(worst, float(np.abs(np.subtract(found, (left, right, top, bottom))).max()))
    assert len(looks) == 4
    assert worst < 0.1  # pixels of what the model sees; measured: 0.047


def test_a_crop_holds_an_object_whole_and_stays_in_its_bounds():
    rng = np.random.default_rng(1)
    count = 4000
    sizes = rng.integers(40, 3000, (count, 2))
    corners = np.sort(rng.uniform(0, 1, (count, 3, 2, 2)) ** 2, axis=2) * sizes[:, None, None, :]
    boxes = corners.reshape(-1, 4).astype(np.float32).astype(np.float64)
    num_boxes = np.full(count, 3)
    num_boxes[::5] = 0
    boxes = boxes.reshape(count, 3, 4)[num_boxes > 0].reshape(-1, 4)
    config = AugmentConfig(crop=CropConfig(1.0, [0.1, 0.6], [0.5, 2.0]), scale_jitter=[0.3, 3.0])
    words = random_words(3, 0, 0, count, Purpose.AUGMENTATION, NUM_WORDS)
    everything = np.full(count, int(Moves.SCALE | Moves.CROP), dtype=np.uint8)
    found = draw_shown(config, SPEC, words, sizes, everything, boxes, num_boxes)
    crops, sides = found.crops, found.crops[:, 2:] - found.crops[:, :2]
    assert (crops[:, :2] >= 0).all() and (crops[:, 2:] <= sizes).all() and (sides > 0).all()
    owners = np.repeat(np.arange(count), num_boxes)
    whole = (boxes[:, :2] >= crops[owners, :2]).all(axis=1) & (boxes[:, 2:] <= crops[owners, 2:]).all(axis=1)
    assert (np.bincount(owners[whole], minlength=count)[num_boxes > 0] > 0).all()
    shares = sides / sizes
    ratio, step = shares[:, 0] / shares[:, 1], 1 / sides.min(axis=1)
    assert (ratio <= 2 * (1 + step)).all() and (ratio >= 0.5 / (1 + step)).all()
    empty = num_boxes == 0
    area = shares[empty].prod(axis=1)
    assert area.min() < 0.15 and area.max() < 0.65 and 0.3 < area.mean() < 0.4
    assert abs((found.crops[empty, 0] / (sizes[empty, 0] - sides[empty, 0] + 1e-9)).mean() - 0.5) < 0.05
    areas = found.sizes.prod(axis=1)
    bounds = largest_sides(config, SPEC, sizes.astype(np.float64))
    wide, high = found.sizes.T
    assert (wide <= bounds[:, :, 0].max(axis=0)).all() and (high <= bounds[:, :, 1].max(axis=0)).all()
    assert areas.min() < 5000 and areas.max() < SPEC.max_pixels * 1.02
    tokens = [np.prod(resized_size(size[0], size[1], SPEC)) for size in found.sizes.tolist()]
    assert max(tokens) <= SPEC.max_pixels and min(tokens) >= SPEC.min_pixels


def test_parts_end_after_their_epochs(make_sample):
    sample = make_sample(1, 3, 200, 160)
    always, first = (augmentation(AugmentConfig(crop=CropConfig(probability=1.0, epochs=n))) for n in (None, 2))
    whole = Drawn((200, 160), (0, 0, 200, 160), False, (200, 160), None)
    for epoch in range(4):
        shown, drawn = always.show(sample, [], epoch, 5), first.show(sample, [], epoch, 5)
        assert shown[2] != [whole]
        assert drawn == (shown if epoch < 2 else (sample, [], [whole]))


def test_a_run_from_before_parts_could_end_is_resumed():
    assert augmentation(EVERYTHING).digest() == "fe432db17f7e720d"  # of commit afdb792
    parts = replace(EVERYTHING, crop=CropConfig(probability=0.8, epochs=3))
    assert augmentation(parts).digest() != augmentation(EVERYTHING).digest()


def test_one_draw_is_the_same_among_many():
    rng = np.random.default_rng(2)
    sizes = rng.integers(40, 2000, (300, 2))
    boxes = (np.sort(rng.uniform(0, 1, (300, 2, 2, 2)), axis=2) * sizes[:, None, None, :]).reshape(-1, 4)
    words = random_words(3, 5, 0, 300, Purpose.AUGMENTATION, NUM_WORDS)
    moves, counts = np.full(300, 7, dtype=np.uint8), np.full(300, 2)
    many = draw_shown(EVERYTHING, SPEC, words, sizes, moves, boxes, counts)
    for row in range(300):
        own = random_words(3, 5, row, 1, Purpose.AUGMENTATION, NUM_WORDS)
        here = slice(row, row + 1)
        one = draw_shown(EVERYTHING, SPEC, own, sizes[here], moves[here], boxes[2 * row : 2 * row + 2], counts[here])
        for name in ("crops", "flips", "sizes"):
            assert np.array_equal(getattr(one, name)[0], getattr(many, name)[row])


def test_leftovers_go_from_the_target_and_from_the_answer(encoder: Encoder):
    """Of 100 x 80, cut at x = 50: objects by what is left of them; crowds stay."""
    objects = (
        Object((10, 10, 40, 40), "gone"),
        Object((40, 10, 60, 40), "half", area=300.0),
        Object((45, 10, 95, 70), "most", area=2000.0),
        Object((47, 10, 51, 60), "thin"),
        Object((60, 60, 63, 63), "tiny and whole"),
        Object((0, 0, 60, 80), "", iscrowd=True, area=4000.0),
        Object((0, 0, 50, 80), "crowd outside", iscrowd=True),
    )
    config = AugmentConfig(crop=CropConfig(least_visible=0.5, least_pixels=8))
    boxes, seen, cut = move_boxes(
        np.array([item.box for item in objects], dtype=np.float64),
        shown((50, 0, 100, 80), False, (50, 80)),
        np.zeros(7, dtype=np.int64),
    )
    assert is_kept(config, boxes, seen, cut).tolist() == [False, True, True, False, True, False, False]
    sample = replace(rectangle((45, 10, 95, 70), 100, 80), objects=objects)
    other = augmentation(config).move(sample, shown((50, 0, 100, 80), True, (100, 160)))
    assert other.objects is not None and (other.width, other.height) == (100, 160)
    assert [(item.caption, item.box, item.area) for item in other.objects] == [
        ("half", (80, 20, 100, 80), 300 / 2 * 4),
        ("most", (10, 20, 100, 140), 2000 * 0.9 * 4),
        ("tiny and whole", (74, 120, 80, 126), None),
        ("", (80, 0, 100, 160), 4000 / 6 * 4),
    ]
    drawn = Drawn((100, 80), (50, 0, 100, 80), True, (100, 160), None)
    example = encoder(other, drawn=[drawn])
    (target,) = example.targets
    assert target is not None and len(target["boxes"]) == 3
    text = encoder.tokenizer.decode(example.input_ids)
    assert "gone" not in text and "thin" not in text and text.count("bbox_2d") == 3


def test_sides_in_captions_are_exchanged_and_others_prevent_the_flip():
    always = augmentation(AugmentConfig(horizontal_flip=1.0))
    sample = rectangle((10, 10, 30, 30), 60, 50)

    def caption(text: str) -> tuple[str, tuple[float, ...]]:
        other, _, _ = always.show(replace(sample, objects=(Object((10, 10, 30, 30), text),)), [], 0, 0)
        assert other.objects is not None
        return other.objects[0].caption, other.objects[0].box

    assert caption("on the left") == ("on the right", (30, 10, 50, 30))
    assert caption("red") == ("red", (30, 10, 50, 30))
    assert caption("a right answer") == ("a right answer", (10, 10, 30, 30))


CHAT = ({"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "blue"})


def with_box(question: str, *boxes: tuple[float, ...]) -> Any:
    parts = [{"type": "box", "box": list(box)} for box in boxes]
    return (
        {"role": "user", "content": question},
        {"role": "assistant", "content": [*parts, {"type": "text", "text": "!"}]},
    )


@pytest.mark.parametrize(
    ("changes", "moves"),
    [
        ({}, Moves.SCALE | Moves.FLIP | Moves.CROP),
        ({"objects": ()}, Moves.SCALE | Moves.FLIP | Moves.CROP),
        ({"objects": (Object((0, 0, 9, 9), "on the left"),)}, Moves.SCALE | Moves.FLIP),
        ({"objects": (Object((0, 0, 9, 9), "bus 42"),)}, Moves.SCALE | Moves.CROP),
        ({"objects": (Object((0, 0, 9, 9), "the right answer"),)}, Moves.SCALE),
        ({"objects": None}, Moves.NONE),
        ({"messages": CHAT}, Moves.NONE),
        ({"messages": with_box("where?", (1, 2, 30, 40))}, Moves.SCALE | Moves.FLIP | Moves.CROP),
        ({"messages": with_box("where on the left?", (1, 2, 30, 40))}, Moves.SCALE),
        ({"image": b"", "width": 0, "height": 0, "objects": None, "messages": CHAT}, Moves.NONE),
    ],
)
def test_geometry_changes_only_where_texts_stay_true(make_sample, changes: dict[str, Any], moves: Moves):
    sample = replace(rectangle((10, 10, 30, 30), 60, 50), **changes)
    assert moves_of(sample, WORDS) == moves


def test_boxes_of_a_chat_follow_and_stay_whole():
    sample = replace(
        rectangle((10, 10, 30, 30), 300, 200), messages=with_box("where?", (40, 20, 90, 60), (80, 50, 140, 90))
    )
    looks = set()
    for occurrence in range(40):
        other, _, (how,) = augmentation(EVERYTHING).show(sample, [], 0, occurrence)
        assert how is not None and other.messages is not None
        first, second, text = other.messages[1]["content"]
        assert text == {"type": "text", "text": "!"} and other.messages[0] == sample.messages[0]  # type: ignore[index]
        scale = other.width / (how.crop[2] - how.crop[0])
        widths = [box["box"][2] - box["box"][0] for box in (first, second)]
        assert widths == pytest.approx([50 * scale, 60 * scale])
        looks.add(how.crop)
    assert len(looks) > 10


def test_where_nothing_is_drawn_nothing_changes(encoder: Encoder, make_sample):
    config = AugmentConfig(horizontal_flip=1e-9, crop=CropConfig(probability=0.0), colour=ColourConfig(probability=0.0))
    plain = ExampleMaker(encoder, None, 3)
    for number in range(4):
        sample = make_sample(number, number, 60 + 40 * number, 90)
        same = ExampleMaker(encoder, None, 3, Augmentation.of(config, encoder.image_spec, 3))(
            sample.to_mds(), 1, number
        )
        expected = plain(sample.to_mds(), 1, number)
        assert same.drawn == f"whole {sample.width} x {sample.height}" and expected.drawn == ""
        for name in ("input_ids", "roles", "position_ids", "pixel_patches"):
            assert torch.equal(getattr(same, name), getattr(expected, name))
        assert same.noise_seeds == expected.noise_seeds
        for here, there in zip(same.targets, expected.targets, strict=True):
            assert here is not None and there is not None and torch.equal(here["boxes"], there["boxes"])


def test_colours_change_pixels_and_nothing_else(encoder: Encoder, make_sample):
    config = AugmentConfig(colour=ColourConfig(probability=1.0, hue=0.1))
    sample = make_sample(1, 2)
    plain = ExampleMaker(encoder, None, 3)(sample.to_mds(), 0, 5)
    drawn = ExampleMaker(encoder, None, 3, Augmentation.of(config, encoder.image_spec, 3))(sample.to_mds(), 0, 5)
    assert torch.equal(drawn.input_ids, plain.input_ids) and not torch.equal(drawn.pixel_patches, plain.pixel_patches)
    assert drawn.drawn.startswith("whole 80 x 60, brightness ")
    looks = {augmentation(config).show(sample, [], epoch, place)[2][0] for epoch in (0, 1) for place in range(20)}
    colours = np.array([how.colour for how in looks if how is not None])
    assert len(colours) == 40 and (np.abs(colours[:, :3] - 1) <= 0.2).all() and (np.abs(colours[:, 3]) <= 0.1).all()


def test_an_image_of_another_size_is_named(encoder: Encoder, make_sample):
    maker = ExampleMaker(encoder, None, 3, Augmentation.of(EVERYTHING, encoder.image_spec, 3))
    with pytest.raises(ValueError, match=r"sample 'sample-1': its image does not have the stated 81 x 60 pixels"):
        maker(replace(make_sample(1), width=81).to_mds(), 0, 0)
