"""The caption decoder: cached steps are teacher forcing, nothing sees the future, captions do not see one another."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recipe.config import RecipeConfig
from recipe.joint import JointModel
from recipe.models.caption_decoder import REGION, CaptionCache, CaptionDecoder, read_regions
from recipe.models.memory import MemoryBuilder
from recipe.prediction.decode import generate_captions
from recipe.schema import CaptionPlaces, Memory
from tests.support.memories import of_image, of_map, random_memory
from tests.support.tiny_cases import make_model

LENGTH = 10
NUM_TOKENS = 320


@pytest.fixture(scope="module")
def model(tiny_config: Callable[..., RecipeConfig]) -> JointModel:
    return make_model(tiny_config()).eval()


@pytest.fixture
def decoder(model: JointModel) -> CaptionDecoder:
    return model.model.caption_decoder


class Inputs:
    """Two, one and two captions of three images, not in their order; the second image has a shorter memory."""

    def __init__(self, model: JointModel):
        generator = torch.Generator().manual_seed(0)
        width = model.model.caption_decoder.width
        self.image = torch.tensor([0, 2, 1, 0, 2])
        self.places = CaptionPlaces(self.image, torch.tensor([0, 3, 1, 1, 0]), 3, 4)
        self.features = torch.randn(5, width, generator=generator, dtype=torch.float64)
        self.boxes = torch.rand(5, 4, generator=generator, dtype=torch.float64)
        self.memory = random_memory([12, 7, 12], width, generator)
        self.ids = torch.randint(0, NUM_TOKENS, (5, LENGTH), generator=generator)
        self.embed, self.logits = model.model.vlm.embed_tokens, model.model.vlm.logits


@pytest.fixture
def inputs(model: JointModel) -> Inputs:
    return Inputs(model)


def teacher_forced(decoder: CaptionDecoder, inputs: Inputs, ids: Tensor) -> Tensor:
    hidden = decoder(inputs.features, inputs.boxes, inputs.places, inputs.memory, inputs.embed(ids))
    return inputs.logits(hidden)  # (R, C, V)


@torch.no_grad()
def test_cached_logits_are_teacher_forced_logits(decoder: CaptionDecoder, inputs: Inputs):
    expected = teacher_forced(decoder, inputs, inputs.ids)
    cache = CaptionCache()
    found_by = (inputs.features, inputs.boxes, inputs.places, inputs.memory)
    steps = [decoder(*found_by, None, cache)]
    for step in range(LENGTH):
        steps.append(decoder(*found_by, inputs.embed(inputs.ids[:, step : step + 1]), cache))
    found = inputs.logits(torch.cat(steps, dim=1))
    assert found.shape == expected.shape == (5, LENGTH + 1, expected.shape[-1])
    assert float(expected.std()) > 0.1
    # measured: 7.8e-16 of logits around 1
    assert float((found - expected).abs().max()) <= 1e-12


@torch.no_grad()
def test_no_step_sees_the_future(decoder: CaptionDecoder, inputs: Inputs):
    """Token j is the input of step j + 1 and the target of step j."""
    before = teacher_forced(decoder, inputs, inputs.ids)
    for j in range(LENGTH):
        ids = inputs.ids.clone()
        ids[..., j] = (ids[..., j] + 1) % NUM_TOKENS
        after = teacher_forced(decoder, inputs, ids)
        assert torch.equal(after[:, : j + 1], before[:, : j + 1])
        assert (after[:, j + 1 :] != before[:, j + 1 :]).any(-1).all()


@torch.no_grad()
def test_captions_do_not_see_one_another(decoder: CaptionDecoder, inputs: Inputs):
    before = teacher_forced(decoder, inputs, inputs.ids)
    ids = inputs.ids.clone()
    ids[3] = (ids[3] + 1) % NUM_TOKENS
    inputs.features[3] += 1
    inputs.boxes[3] = 0.9 - inputs.boxes[3] / 2
    after = teacher_forced(decoder, inputs, ids)
    assert (after != before).flatten(1).any(-1).tolist() == [False, False, False, True, False]


@torch.no_grad()
def test_captions_read_their_own_memory_and_its_real_tokens_only(decoder: CaptionDecoder, inputs: Inputs):
    before = teacher_forced(decoder, inputs, inputs.ids)
    inputs.memory.tokens[1, 7:] += 1
    assert torch.equal(teacher_forced(decoder, inputs, inputs.ids), before)
    inputs.memory.tokens[1, 6] += 1
    after = teacher_forced(decoder, inputs, inputs.ids)
    assert torch.equal((after != before).flatten(1).any(-1), inputs.image == 1)


@torch.no_grad()
def test_a_caption_beside_others_is_the_caption_alone(decoder: CaptionDecoder, inputs: Inputs):
    """Also in another slot, and with no slot to spare."""
    together = teacher_forced(decoder, inputs, inputs.ids)
    for row, image in enumerate(inputs.image.tolist()):
        one, zero = slice(row, row + 1), torch.zeros(1, dtype=torch.int64)
        memory = of_image(inputs.memory, image)
        embeds = inputs.embed(inputs.ids[one])
        hidden = decoder(inputs.features[one], inputs.boxes[one], CaptionPlaces(zero, zero, 1, 1), memory, embeds)
        # measured: 1.8e-15 of logits around 1
        assert float((inputs.logits(hidden)[0] - together[row]).abs().max()) <= 1e-12


def test_captions_send_no_gradient_into_the_boxes(decoder: CaptionDecoder, inputs: Inputs):
    inputs.boxes.requires_grad_()
    inputs.features.requires_grad_()
    logits = teacher_forced(decoder, inputs, inputs.ids)
    gradients = torch.autograd.grad(logits.sum(), [inputs.boxes, inputs.features], allow_unused=True)
    assert gradients[0] is None and gradients[1] is not None and gradients[1].any()


def generate(
    decoder: CaptionDecoder,
    inputs: Inputs,
    eos_token_id: int,
    rows: Tensor | None = None,
    places: CaptionPlaces | None = None,
    memory: Memory | None = None,
) -> Tensor:
    rows = torch.arange(len(inputs.features)) if rows is None else rows
    return generate_captions(
        decoder,
        inputs.features[rows],
        inputs.boxes[rows],
        places or inputs.places,
        memory or inputs.memory,
        inputs.embed,
        inputs.logits,
        eos_token_id,
    )


@torch.no_grad()
def test_generation_is_greedy_teacher_forcing(decoder: CaptionDecoder, inputs: Inputs):
    """Every token is the best one of a teacher-forced pass over the tokens before it; after its end only ends."""
    never = 319
    free = generate(decoder, inputs, never)
    assert free.shape == (5, decoder.max_caption_tokens) and len(free.unique()) > 3
    eos = int(free[0, 1])  # so that at least one caption ends early
    ids = generate(decoder, inputs, eos)
    best = teacher_forced(decoder, inputs, ids[..., :-1]).argmax(-1)
    ended = ((ids == eos).cumsum(-1) - (ids == eos).int()) > 0
    assert ended[0].any()
    assert torch.equal(ids, best.masked_fill(ended, eos))


@torch.no_grad()
def test_generation_together_is_each_image_alone(decoder: CaptionDecoder, inputs: Inputs):
    """Also without the padding of the memory."""
    eos = 319
    together = generate(decoder, inputs, eos)
    for image in range(3):
        memory = of_image(inputs.memory, image, padded=False)
        rows = (inputs.image == image).nonzero()[:, 0]
        places = CaptionPlaces(torch.zeros_like(rows), torch.arange(len(rows)), 1, len(rows))
        alone = generate(decoder, inputs, eos, rows=rows, places=places, memory=memory)
        length = alone.shape[1]
        assert torch.equal(together[rows, :length], alone)
        assert (together[rows, length:] == eos).all()


def ramps(columns: int, rows: int) -> Tensor:
    """A map (1, rows, columns, 2) that holds each cell's column and row, plus one, which bilinear reading continues."""
    y, x = torch.meshgrid(torch.arange(rows) + 1.0, torch.arange(columns) + 1.0, indexing="ij")
    return torch.stack([x, y], dim=-1)[None].double()


def test_a_region_by_hand():
    """A box over four by two cells of a map of eight by four: the points lie at 1/8, 3/8, 5/8 and 7/8 of its sides."""
    memory = of_map(ramps(8, 4))
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)  # columns 2 to 6, rows 1 to 3
    places = CaptionPlaces(torch.tensor([0]), torch.tensor([0]), 1, 1)
    found = read_regions(boxes, places, memory).view(REGION, REGION, 2)
    assert torch.allclose(found[0, :, 0], torch.tensor([3.0, 4.0, 5.0, 6.0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(
        found[:, 0, 1], torch.tensor([1.75, 2.25, 2.75, 3.25], dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_a_region_of_a_padded_map_is_that_of_the_image_alone():
    generator = torch.Generator().manual_seed(1)
    boxes = torch.rand(3, 4, generator=generator, dtype=torch.float64)  # some reach beyond the image
    alone = of_map(torch.randn(1, 6, 5, 4, generator=generator, dtype=torch.float64))
    padded = of_map(torch.nn.functional.pad(alone.levels[0], (0, 0, 0, 3, 0, 2)), (5 / 8, 6 / 8))
    places = CaptionPlaces(torch.zeros(3, dtype=torch.int64), torch.arange(3), 1, 3)
    found, expected = read_regions(boxes, places, padded), read_regions(boxes, places, alone)
    # measured: 4.4e-16
    assert float((found - expected).abs().max()) <= 1e-14


def test_a_caption_reads_its_own_box_of_its_own_image(decoder: CaptionDecoder, inputs: Inputs):
    inputs.boxes[:] = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
    before = teacher_forced(decoder, inputs, inputs.ids)
    inputs.memory.levels[0][1, 6:, 6:] += 1  # of the second image, far from its box
    assert torch.equal(teacher_forced(decoder, inputs, inputs.ids), before)
    inputs.memory.levels[0][1, :3, :3] += 1
    after = teacher_forced(decoder, inputs, inputs.ids)
    assert torch.equal((after != before).flatten(1).any(-1), inputs.image == 1)


@torch.no_grad()
def test_a_caption_looks_from_the_place_of_its_box(decoder: CaptionDecoder, monkeypatch: pytest.MonkeyPatch):
    """A box in the middle of a token has the position of that token in the memory, in images of any size."""
    grids, generator = [(2, 3), (5, 4)], torch.Generator().manual_seed(0)
    builder = MemoryBuilder(8, decoder.width, 4, memory_positions=True).double()
    features = [torch.randn(rows * columns, 8, generator=generator).double() for rows, columns in grids]
    memory = builder(features, grids, torch.zeros(2, 1, 8).double(), torch.ones(2, 1).bool())
    seen: list[Tensor] = []
    looks = decoder.layers[0].cross_attention.query_positions
    monkeypatch.setattr(
        decoder.layers[0].cross_attention, "query_positions", lambda places: seen.append(places) or looks(places)
    )
    monkeypatch.setattr(decoder, "region", None)
    places = CaptionPlaces(torch.tensor([0, 1]), torch.tensor([0, 0]), 2, 1)
    features = torch.zeros(2, decoder.width).double()
    decoder(features, memory.cells[:, 3].double(), places, memory, None)
    assert torch.allclose(seen[0][:, 0], memory.positions[:, 3], atol=1e-5)  # cells are float32
