"""Check that the peers of the convergence benchmark learn, all of them, and are shown and judged as ours is."""

import math
from io import BytesIO
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_convert

import peer_detr
from convert.shapes import draw_scene
from peer_detr import (
    PEERS,
    Budget,
    HuggingFaceDetr,
    Peer,
    Target,
    TorchvisionFcos,
    TrainingImages,
    View,
    build_peer,
    class_names,
    evaluate_peer,
    train_peer,
)
from real_sets import pixel_statistics
from recipe.config import AugmentConfig
from recipe.schema import ImageSpec, Object, Sample

STATISTICS_SIZE = (96, 128)  # rows and columns at which `pixel_statistics` looks at images
SPEC = ImageSpec(14, 2, 4 * 28**2, 16 * 28**2, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    """Return scenes of two sizes; one holds nothing."""
    sizes = (64, 96, 64, 64)
    scenes = [draw_scene(seed=3, index=index, image_size=size, max_objects=2) for index, size in enumerate(sizes)]
    return [*scenes, Sample("empty", scenes[0].image, scenes[0].width, scenes[0].height, ())]


def trained_peer(kind: str, scenes: list[Sample], seconds: int) -> tuple[Peer, dict[str, Tensor], tuple[int, float]]:
    """Return a peer trained by a clock that is read once per step; its first weights; its steps and seconds."""
    clock = iter(range(seconds + 2))
    torch.manual_seed(0)
    names = class_names(scenes, None)
    peer = build_peer(kind, len(names), num_queries=10, width=64, num_layers=2, num_heads=2)
    before = {name: weight.detach().clone() for name, weight in peer.named_parameters()}
    budget = Budget(seconds, batch_size=3, learning_rate=1e-3)
    view = View.of(kind, SPEC, None, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_detr, "time", SimpleNamespace(process_time=lambda: next(clock)))
        return peer, before, train_peer(peer, scenes, view, budget, seed=0, names=names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PEERS)
def test_peers_are_trained(kind: str, scenes: list[Sample]) -> None:
    """For their time and no longer; batch norm too, which Hugging Face freezes; nothing is left as it was drawn."""
    peer, before, (steps, seconds) = trained_peer(kind, scenes, seconds=4)
    assert (steps, seconds) == (4, 4)
    weights = dict(peer.named_parameters())
    assert [name for name, weight in weights.items() if weight.grad is None] == []
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    assert [name for name, weight in weights.items() if torch.equal(weight, before[name])] == []
    assert not any("Frozen" in type(module).__name__ for module in peer.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in peer.modules()) >= 20
    scores = evaluate_peer(peer, scenes, View.of(kind, SPEC, None, seed=0))
    assert 0 <= scores["box_ap50"] <= 1


class Oracle(nn.Module):
    """Says what is true of the scenes that it is shown, in turn, but for the boxes that `wrong` moves."""

    def __init__(self, scenes: list[Sample], wrong: int = 0):
        super().__init__()
        boxes = [torch.tensor([item.box for item in scene.objects or ()]) / scene.width for scene in scenes]
        boxes[:wrong] = [torch.tensor([[0.0, 0.0, 0.01, 0.01]])] * wrong
        self.boxes = iter(boxes)

    def detect(self, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        boxes = [next(self.boxes) for _ in images]
        return [(row, torch.full((len(row),), 0.9)) for row in boxes]


def test_peers_are_judged_by_where_they_find_things() -> None:
    """In pixels of the stored image, which the resized one does not change."""
    scenes = [draw_scene(seed=5, index=index, image_size=64 + 8 * index, max_objects=1) for index in range(4)]
    view = View.of("fcos", SPEC, None, seed=0)
    for wrong, least, most in ((0, 1, 1), (4, 0, 0), (2, 0.2, 0.6)):
        oracle = cast(Any, Oracle(scenes, wrong))
        assert least - 1e-9 <= evaluate_peer(oracle, scenes, view)["box_ap50"] <= most + 1e-9


def test_a_mask_tells_images_from_padding() -> None:
    found: dict[str, Any] = {}

    class Model(nn.Module):
        def forward(self, **inputs: Any) -> SimpleNamespace:
            found.update(inputs)
            return SimpleNamespace(loss=torch.tensor(0.0))

    HuggingFaceDetr(Model()).loss(
        [torch.ones(3, 2, 4), torch.ones(3, 3, 1)], [Target(torch.zeros(0, 4), torch.zeros(0))] * 2
    )
    assert found["pixel_values"].shape == (2, 3, 3, 4)
    assert found["pixel_mask"].tolist() == [[[1] * 4, [1] * 4, [0] * 4], [[1, 0, 0, 0]] * 3]
    assert torch.equal(found["pixel_values"], found["pixel_mask"][:, None].expand(2, 3, 3, 4).float())


def test_rt_detr_pads_at_the_right_and_bottom_by_hand() -> None:
    """To a multiple of the stride; its boxes are relative to the padded images, ours to each image."""
    given: dict[str, Any] = {}
    box = torch.tensor([[0.25, 0.5, 0.5, 1.0]])  # cxcywh

    class Model(nn.Module):
        def forward(self, **inputs: Any) -> SimpleNamespace:
            given.update(inputs)
            return SimpleNamespace(loss=torch.tensor(3.0), pred_boxes=box.expand(2, 1, 4), logits=torch.zeros(2, 1, 2))

    peer = HuggingFaceDetr(Model(), takes_mask=False, stride=32)
    images = [torch.full((3, 48, 64), 2.0), torch.full((3, 32, 32), 3.0)]
    assert peer.loss(images, [Target(box, torch.tensor([1])), Target(torch.zeros(0, 4), torch.zeros(0))]) == 3
    assert given.keys() == {"pixel_values", "labels"}
    assert given["pixel_values"].shape == (2, 3, 64, 64)  # 48 rows become 64
    for row, image in zip(given["pixel_values"], images, strict=True):
        assert torch.equal(row[:, : image.shape[1], : image.shape[2]], image) and row.sum() == image.sum()
    assert given["labels"][0]["boxes"].tolist() == [[0.25, 0.375, 0.5, 0.75]]  # 48 of 64 rows
    assert given["labels"][1]["boxes"].shape == (0, 4)
    (first, scores), (second, _) = peer.detect(images)
    assert first.tolist() == [[0, 0, 0.5, pytest.approx(64 / 48)]]
    assert second.tolist() == [[0, 0, 1, 2]]
    assert scores.tolist() == [0.5]


def test_fcos_boxes_by_hand() -> None:
    """Pixels of the resized image there, shares of it here; the best of equal boxes of two classes."""
    given: list[Any] = []

    class Model(nn.Module):
        def forward(self, images: list[Tensor], labels: list[dict[str, Tensor]] | None = None) -> Any:
            if labels is not None:
                given.extend(labels)
                return {"one": torch.tensor(1.0), "two": torch.tensor(2.0)}
            boxes = torch.tensor([[10.0, 5.0, 30.0, 15.0], [10.0, 5.0, 30.0, 15.0], [0.0, 0.0, 5.0, 5.0]])
            return [{"boxes": boxes, "scores": torch.tensor([0.3, 0.8, 0.5]), "labels": torch.tensor([0, 1, 0])}]

    fcos = TorchvisionFcos(2)
    fcos.model = cast(Any, Model())
    image = torch.zeros(3, 20, 40)
    target = Target(torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([1]))
    assert fcos.loss([image], [target]) == 3
    assert given[0]["boxes"].tolist() == [[10, 5, 30, 15]]
    ((boxes, scores),) = fcos.detect([image])
    assert scores.tolist() == pytest.approx([0.8, 0.5])
    assert boxes[0].tolist() == pytest.approx([0.25, 0.25, 0.75, 0.75])


@pytest.mark.parametrize("training", [True, False])
def test_fcos_sees_images_as_they_are_given(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded to one size, of multiples of 32, and neither resized nor normalised again."""
    fcos = TorchvisionFcos(1).train(training)
    seen: list[Tensor] = []

    def backbone(images: Tensor) -> Tensor:
        seen.append(images)
        raise StopIteration

    monkeypatch.setattr(fcos.model.backbone, "forward", backbone)
    images = [torch.full((3, 40, 70), 2.0), torch.full((3, 33, 20), 3.0)]
    with pytest.raises(StopIteration):
        fcos.loss(images, [Target(torch.zeros(0, 4), torch.zeros(0))] * 2) if training else fcos.detect(images)
    assert seen[0].shape == (2, 3, 64, 96)
    assert torch.equal(seen[0][0, :, :40, :70], images[0]) and torch.equal(seen[0][1, :, :33, :20], images[1])


def two_halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> Sample:
    """Return two colours, each on one half, the left one an object."""
    (rows, columns), data = STATISTICS_SIZE, BytesIO()
    image = Image.new("RGB", (columns, rows), left)
    image.paste(right, (columns // 2, 0, columns, rows))
    image.save(data, "PNG")
    return Sample("two", data.getvalue(), columns, rows, (Object((0, 0, columns / 2, rows), "red left arm"),))


def test_augmentation_moves_image_box_and_class() -> None:
    """By the recipe's own functions: a flip of the left, red half."""
    sample = two_halves((255, 0, 0), (0, 0, 255))
    augment = AugmentConfig(horizontal_flip=1.0)
    names = class_names([sample], augment)
    assert names == ["red left arm", "red right arm"]
    plain, flipped = (
        TrainingImages([sample], View.of("fcos", SPEC, section, seed=3), names).get(0, 0) for section in (None, augment)
    )
    assert torch.equal(flipped[0], plain[0].flip(-1))
    assert (plain[1].boxes.tolist(), flipped[1].boxes.tolist()) == ([[0.25, 0.5, 0.5, 1]], [[0.75, 0.5, 0.5, 1]])
    assert (plain[1].classes.tolist(), flipped[1].classes.tolist()) == ([0], [1])
    assert plain[0][0, 0, 0] == pytest.approx(2)  # (1 - 0.5) / 0.25


def test_sizes_of_a_peer() -> None:
    """The recipe's rule, by which ours sees an image too; RT-DETR takes multiples of 32."""
    wide = two_halves((0, 0, 0), (0, 0, 0))  # 128 x 96
    square = draw_scene(seed=3, index=0, image_size=96)
    sizes = {"fcos": {(84, 140), (84, 84)}, "rt_detr": {(96, 128), (96, 96)}}
    for kind, expected in sizes.items():
        view = View.of(kind, SPEC, None, seed=0)
        found = {tuple(TrainingImages([one], view, []).get(0, 0)[0].shape[1:]) for one in (wide, square)}
        assert found == expected


def test_targets_leave_crowds_out() -> None:
    scene = draw_scene(seed=3, index=1, image_size=64, min_objects=2, max_objects=2)
    assert scene.objects is not None
    one, other = scene.objects
    crowd = Sample("crowd", scene.image, 64, 64, (Object(one.box, one.caption, iscrowd=True), other))
    images = TrainingImages([crowd], View.of("fcos", SPEC, None, seed=0), [])
    target = images.target(crowd)
    assert target.classes.tolist() == [0]
    expected = box_convert(torch.tensor([other.box]) / 64, "xyxy", "cxcywh")
    torch.testing.assert_close(target.boxes, expected)


def test_pixel_statistics_by_hand() -> None:
    """Red is 1 and 0, green always 0.2, blue 0.6 and 0.2; n - 1 pixels are divided by."""
    one, other = (255, 51, 153), (0, 51, 51)
    mean, std = pixel_statistics([two_halves(one, other)])
    assert mean == pytest.approx([0.5, 0.2, 0.4])
    pixels = STATISTICS_SIZE[0] * STATISTICS_SIZE[1]
    larger = math.sqrt(pixels / (pixels - 1))
    assert std == pytest.approx([0.5 * larger, 0, 0.2 * larger], rel=1e-9, abs=1e-9)
    halves = pixel_statistics([two_halves(one, one), two_halves(other, other)])  # the same pixels, each twice
    assert halves[0] == pytest.approx(mean)
    assert halves[1] == pytest.approx(std, rel=1e-4, abs=1e-9)
