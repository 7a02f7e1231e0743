"""Denoising queries: the mask by hand, noise that depends on the seed alone, and its bounds."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert

from recipe.joint import JointModel
from recipe.models.detection_head import attention_mask, make_denoising_queries
from recipe.schema import DenoisingQueries, Target
from tests.support.memories import random_memory

BOX_NOISE = 0.4


def make_target(num_objects: int, seed: int = 0) -> Target:
    """Boxes so far inside the image that no noise reaches its edge."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(num_objects, 2, generator=generator) * 0.2 + 0.1
    center = torch.rand(num_objects, 2, generator=generator) * 0.3 + 0.35
    return {"boxes": torch.cat([center, size], 1), "caption_ids": torch.zeros(num_objects, 1, dtype=torch.int64)}


def make_queries(targets: list[Target | None], seeds: list[int], num_groups: int = 2) -> DenoisingQueries:
    queries = make_denoising_queries(targets, seeds, num_groups, BOX_NOISE)
    assert queries is not None
    return queries


def by_group(queries: DenoisingQueries, values: Tensor) -> Tensor:
    """(N, G * 2 * T, ...) → (N, G, 2, T, ...), positives first."""
    return values.unflatten(1, (queries.num_groups, 2, -1))


def test_attention_mask_by_hand():
    """Two groups of a positive and a negative, then two object queries; the second image has no object."""
    queries = make_queries([make_target(1), make_target(0)], [1, 2])
    rows = ["110011", "110011", "001111", "001111", "000011", "000011"]
    assert attention_mask(queries, 2)[0, 0].int().tolist() == [[int(c) for c in row] for row in rows]
    empty = ["100011", "010011", "001011", "000111", "000011", "000011"]
    assert attention_mask(queries, 2)[1, 0].int().tolist() == [[int(c) for c in row] for row in empty]
    assert attention_mask(queries, 2).shape == (2, 1, 6, 6)


def test_attention_mask_with_groups_of_object_queries_by_hand():
    """A denoising group of a positive and a negative, then two groups of two object queries."""
    rows = ["111100", "111100", "001100", "001100", "000011", "000011"]
    mask = attention_mask(make_queries([make_target(1)], [1], num_groups=1), 4, 2)
    assert mask[0, 0].int().tolist() == [[int(c) for c in row] for row in rows]


def test_positives_move_less_than_the_noise_and_negatives_more():
    target = make_target(40)
    queries = make_queries([target], [5], num_groups=10)
    noised = box_convert(by_group(queries, queries.boxes)[0], "cxcywh", "xyxy")  # (G, 2, T, 4)
    clean = box_convert(target["boxes"], "cxcywh", "xyxy")
    half_sizes = target["boxes"][:, 2:].repeat(1, 2) / 2
    moved = ((noised - clean) / half_sizes).abs()
    positives, negatives = moved[:, 0], moved[:, 1]
    assert 0.95 * BOX_NOISE < float(positives.max()) <= BOX_NOISE + 1e-5
    assert float(negatives.min()) >= BOX_NOISE - 1e-5 and float(negatives.max()) > 1.95 * BOX_NOISE
    assert float(negatives.max()) <= 2 * BOX_NOISE + 1e-5
    assert float(positives.mean()) == pytest.approx(BOX_NOISE / 2, rel=0.05)


def test_each_query_knows_its_object():
    target = make_target(3)
    queries = make_queries([target], [5])
    assert torch.equal(by_group(queries, queries.target_boxes)[0], target["boxes"].expand(2, 2, 3, 4))
    assert by_group(queries, queries.positive)[0].tolist() == [[[True] * 3, [False] * 3]] * 2


def test_noise_stays_inside_the_picture():
    target: Target = {"boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]]), "caption_ids": torch.zeros(1, 1)}
    corners = box_convert(make_queries([target], [0], num_groups=50).boxes, "cxcywh", "xyxy")
    assert float(corners.min()) >= 0 and float(corners.max()) <= 1 + 1e-6


def test_noise_depends_on_the_seed_alone():
    """Not on the place in the batch, on the neighbours, on padding or on torch's own generator."""
    alone = make_queries([make_target(2)], [11])
    torch.manual_seed(99)
    crowd = make_queries([make_target(5, seed=1), None, make_target(2), make_target(0)], [12, 13, 11, 14])
    assert torch.equal(by_group(alone, alone.boxes)[0], by_group(crowd, crowd.boxes)[2][:, :, :2])
    assert by_group(crowd, crowd.valid)[2].tolist() == [[[True, True, False, False, False]] * 2] * 2
    assert not crowd.valid[[1, 3]].any()
    assert not torch.equal(make_queries([make_target(2)], [12]).boxes, alone.boxes)


def test_groups_are_unlike_one_another():
    queries = make_queries([make_target(2)], [11])
    first, second = by_group(queries, queries.boxes)[0]
    assert not (first == second).any()


def test_nothing_to_denoise():
    assert make_denoising_queries([make_target(0), None], [1, 2], 4, BOX_NOISE) is None
    assert make_denoising_queries([make_target(2)], [1], 0, BOX_NOISE) is None


@torch.no_grad()
def test_groups_and_object_queries_do_not_see_a_group(tiny_model: JointModel):
    """Other noise in the first group changes nothing but the first group."""
    generator = torch.Generator().manual_seed(0)
    head = tiny_model.model.detection_head
    memory = random_memory([9], head.width, generator)
    queries = make_queries([make_target(2)], [3])
    objects, denoised = head(memory, queries)
    queries.boxes = queries.boxes.clone()
    queries.boxes[:, :4] = make_queries([make_target(2)], [4]).boxes[:, :4]
    other_objects, other_denoised = head(memory, queries)
    for name in ("pred_boxes", "pred_objectness", "query_features"):
        assert torch.equal(getattr(objects, name), getattr(other_objects, name))
        assert torch.equal(getattr(denoised, name)[:, 4:], getattr(other_denoised, name)[:, 4:])
        assert not (getattr(denoised, name)[:, :4] == getattr(other_denoised, name)[:, :4]).any()
