"""The detection memory: positions by hand, padding that is no one's business, and the switch."""

import math

import pytest
import torch

from recipe.models.memory import MemoryBuilder, grid_cells, sine_embedding

HIDDEN, WIDTH = 12, 8


@pytest.fixture
def builder() -> MemoryBuilder:
    torch.manual_seed(0)
    return MemoryBuilder(HIDDEN, WIDTH, adapter_ratio=4, memory_positions=True).double()


def random_states(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_grid_cells_by_hand():
    """Two rows of three cells, row after row, x before y."""
    third = 1 / 3
    expected = [
        [third / 2, 0.25],
        [0.5, 0.25],
        [2.5 * third, 0.25],
        [third / 2, 0.75],
        [0.5, 0.75],
        [2.5 * third, 0.75],
    ]
    assert torch.allclose(grid_cells(2, 3), torch.tensor([[*centre, third, 0.5] for centre in expected]))


def test_sine_embedding_by_hand():
    """Two waves a coordinate, of 16 tokens and of 16 / 64 ** (1/2) = 2; sines before cosines."""
    found = sine_embedding(torch.tensor([[4.0, 8.25]], dtype=torch.float64), 8)
    slow = torch.pi / 32
    expected = [1.0, 0.0, 0.0, 1.0, -math.sin(slow), math.sin(torch.pi / 4), -math.cos(slow), math.cos(torch.pi / 4)]
    assert torch.allclose(found, torch.tensor([expected], dtype=torch.float64), atol=1e-12)


def test_vision_tokens_have_their_places_and_words_have_none(builder: MemoryBuilder):
    memory = builder([random_states(6, seed=0)], [(2, 3)], random_states(1, 4, seed=1), torch.ones(1, 4).bool())
    assert memory.tokens.shape == memory.positions.shape == (1, 10, WIDTH)
    centers = torch.tensor([[x + 0.5, y + 0.5] for y in range(2) for x in range(3)], dtype=torch.float64)
    assert torch.allclose(memory.positions[0, :6], sine_embedding(centers, WIDTH), atol=1e-5)  # cells are float32
    assert not memory.positions[0, 6:].any()


def test_places_are_computed_in_float32_at_least(builder: MemoryBuilder):
    """The places of a wide image's last tokens are a quarter of a token off in bfloat16."""
    states, words = random_states(40, seed=0).bfloat16(), random_states(1, 1, seed=1).bfloat16()
    memory = builder.bfloat16()([states], [(1, 40)], words, torch.ones(1, 1).bool())
    centers = torch.tensor([[x + 0.5, 0.5] for x in range(40)])
    assert memory.tokens.dtype == memory.positions.dtype == torch.bfloat16
    # measured: 0.0009, the rounding of the waves themselves; with places in bfloat16 0.25
    assert float((memory.positions[0, :40] - sine_embedding(centers, WIDTH)).abs().max()) < 0.005


def test_without_positions_the_memory_is_the_same_but_for_them(builder: MemoryBuilder):
    arguments = ([random_states(6, seed=0)], [(2, 3)], random_states(1, 4, seed=1), torch.ones(1, 4).bool())
    with_positions = builder(*arguments)
    builder.memory_positions = False
    without = builder(*arguments)
    assert torch.equal(without.tokens + with_positions.positions, with_positions.tokens)
    assert with_positions.positions.any() and not without.positions.any()


def test_a_batch_is_each_image_alone(builder: MemoryBuilder):
    """The masked-in tokens and positions, in order; images and prompts of different lengths."""
    features = [random_states(6, seed=0), random_states(4, seed=1), random_states(9, seed=2)]
    sizes, lengths = [(2, 3), (2, 2), (3, 3)], [3, 5, 1]
    prompts = random_states(3, 5, seed=3)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    together = builder(features, sizes, prompts, mask)
    for row, length in enumerate(lengths):
        states = prompts[row : row + 1, :length]
        alone = builder(features[row : row + 1], sizes[row : row + 1], states, torch.ones(1, length).bool())
        real = together.mask[row]
        assert int(real.sum()) == len(features[row]) + length
        assert torch.allclose(together.tokens[row, real], alone.tokens[0], atol=1e-12)
        assert torch.equal(together.positions[row, real], alone.positions[0])
