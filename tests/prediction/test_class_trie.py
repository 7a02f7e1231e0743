"""Class probabilities: the caption decoder's likelihood of each class phrase, normalised where phrases part."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recipe.config import RecipeConfig
from recipe.joint import JointModel
from recipe.prediction.classes import ClassTrie, build_trie, class_probabilities
from recipe.prediction.decode import eos_token_id
from recipe.schema import CaptionPlaces
from tests.support.memories import random_memory
from tests.support.tiny_cases import make_model

# The tiny tokenizer splits words, so phrases share beginnings; one is the beginning of another.
CLASSES = ("bear", "bear cub", "bea", "large red star", "large red square", "large blue star", "x")


@pytest.fixture(scope="module")
def model(tiny_config: Callable[..., RecipeConfig]) -> JointModel:
    return make_model(tiny_config(caption_decoder={"max_caption_tokens": 24})).eval()


def trie_of(model: JointModel, names: tuple[str, ...]) -> ClassTrie:
    return build_trie(names, model.tokenizer, eos_token_id(model.tokenizer), 24)


class Inputs:
    """Two, one and two queries of three images, not in their order; the second image has a shorter memory."""

    def __init__(self, model: JointModel):
        generator = torch.Generator().manual_seed(0)
        width = model.model.caption_decoder.width
        self.places = CaptionPlaces(torch.tensor([0, 2, 1, 0, 2]), torch.tensor([0, 3, 1, 1, 0]), 3, 4)
        self.features = torch.randn(5, width, generator=generator, dtype=torch.float64)
        self.boxes = torch.rand(5, 4, generator=generator, dtype=torch.float64)
        self.memory = random_memory([12, 7, 12], width, generator)


def probabilities(model: JointModel, names: tuple[str, ...]) -> Tensor:
    inputs, vlm = Inputs(model), model.model.vlm
    return class_probabilities(
        model.model.caption_decoder,
        trie_of(model, names),
        inputs.features,
        inputs.boxes,
        inputs.places,
        inputs.memory,
        vlm.embed_tokens,
        vlm.logits_of,
    )


@torch.no_grad()
def by_teacher_forcing(model: JointModel, names: tuple[str, ...]) -> Tensor:
    """Each phrase alone, with the logits of the whole vocabulary."""
    inputs, vlm = Inputs(model), model.model.vlm
    eos = eos_token_id(model.tokenizer)
    tokenizer: Any = model.tokenizer
    phrases = [(*tokenizer(name, add_special_tokens=False)["input_ids"], eos) for name in names]
    rows = []
    for phrase in phrases:
        embeds = vlm.embed_tokens(torch.tensor([phrase[:-1]] * 5))
        states = model.model.caption_decoder(inputs.features, inputs.boxes, inputs.places, inputs.memory, embeds)
        logits = vlm.logits(states)  # (5, C, V)
        likelihood = torch.ones(5, dtype=logits.dtype)
        for step, token in enumerate(phrase):
            children = sorted({other[step] for other in phrases if other[:step] == phrase[:step]})
            likelihood *= logits[:, step, children].softmax(-1)[:, children.index(token)]
        rows.append(likelihood)
    return torch.stack(rows, dim=1)


def test_one_pass_is_each_phrase_alone(model: JointModel) -> None:
    found, expected = probabilities(model, CLASSES), by_teacher_forcing(model, CLASSES)
    assert float(expected.std()) > 0.05
    print("measured", float((found - expected).abs().max()))
    assert float((found - expected).abs().max()) <= 1e-12
    assert float((found.sum(1) - 1).abs().max()) <= 1e-12


def test_the_order_of_classes_is_that_of_the_columns(model: JointModel) -> None:
    found = probabilities(model, CLASSES)
    assert float((probabilities(model, CLASSES[::-1]) - found.flip(1)).abs().max()) <= 1e-12


def test_classes_that_part_at_once_need_the_root_alone(model: JointModel) -> None:
    trie = trie_of(model, ("a", "b", "c"))
    assert trie.tree.tokens.tolist() == [] and trie.tree.depths.tolist() == [0]
    found, expected = probabilities(model, ("a", "b", "c")), by_teacher_forcing(model, ("a", "b", "c"))
    assert float((found - expected).abs().max()) <= 1e-12


class Letters:
    """A tokenizer by hand: a letter is its place in the alphabet."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - ord("a") + 1 for letter in text]}


def test_trie_by_hand() -> None:
    """`ab`, `abc` and `b`: parts after nothing (a, b) and after `ab` (end, c); `a` is on the way."""
    trie = build_trie(("ab", " abc ", "b"), Letters(), 0, 4)  # pyright: ignore[reportArgumentType]
    assert trie.names == ("ab", "abc", "b")
    assert trie.tree.tokens.tolist() == [1, 2]
    assert trie.tree.depths.tolist() == [0, 1, 2]
    assert trie.tree.mask.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert trie.edges.tolist() == [[0, 1, 0], [0, 2, 0], [2, 0, 1], [2, 3, 1]]
    assert trie.paths.int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a",), "1 classes leave no choice: give two or more"),
        (("a", " A"), "the classes 'a' and 'A' are the same: leave one out"),
        (("a", " "), "a class has an empty name"),
        (("a", "abcd"), r"the class 'abcd' has 5 tokens with end-of-sequence, the head writes at most 4 \(caption_dec"),
    ],
)
def test_lists_without_a_choice_are_refused(names: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        build_trie(names, Letters(), 0, 4)  # pyright: ignore[reportArgumentType]
