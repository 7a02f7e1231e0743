"""Beam search: by hand, against all sequences there are, and against transformers' own."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from recipe.prediction.generate import BeamStep, beam_search

EOS = 0
Prefix = tuple[int, ...]


def stepper(models: Sequence[Callable[[Prefix], Tensor]], num_beams: int) -> BeamStep:
    """One model a row: a prefix → (V,) logits. Every beam keeps its prefix as a cache would."""
    prefixes: list[list[Prefix]] = [[()] * num_beams for _ in models]

    def step(parents: Tensor | None, tokens: Tensor | None) -> Tensor:
        if parents is not None and tokens is not None:
            for row, (above, new) in enumerate(zip(parents.tolist(), tokens.tolist(), strict=True)):
                prefixes[row] = [(*prefixes[row][parent], token) for parent, token in zip(above, new, strict=True)]
        rows = [torch.stack([model(p) for p in row]) for model, row in zip(models, prefixes, strict=True)]
        return torch.stack(rows)

    return step


def search(
    models: Sequence[Callable[[Prefix], Tensor]], num_beams: int, max_tokens: int, length_penalty: float = 1.0
) -> list[list[int]]:
    step = stepper(models, num_beams)
    return beam_search(step, len(models), num_beams, max_tokens, EOS, length_penalty, torch.device("cpu")).tolist()


def table(**shares: Sequence[float]) -> Callable[[Prefix], Tensor]:
    """Shares of the tokens after each prefix, written `p12`; after any other the end alone is likely."""

    def model(prefix: Prefix) -> Tensor:
        row = shares.get("p" + "".join(map(str, prefix)), (0.998, 0.001, 0.001))
        return torch.tensor(row, dtype=torch.float64).log() + 3.0  # logits need not be normalised

    return model


# Token 1 is the likelier beginning, but nothing likely follows it.
GARDEN_PATH = table(p=(0.1, 0.5, 0.4), p1=(0.34, 0.33, 0.33), p2=(0.9, 0.05, 0.05))


def test_a_beam_finds_what_greedy_misses():
    """Greedy: 1 and then the end, .5 * .34 = .17; better is 2 and the end, .4 * .9 = .36."""
    assert search([GARDEN_PATH], 2, 3) == [[2, EOS]]
    first = int(GARDEN_PATH(()).argmax())
    assert (first, int(GARDEN_PATH((first,)).argmax())) == (1, EOS)


def test_length_penalty():
    """The end at once has .4, 1 and the end .36: as a mean over the tokens -.92 and -.51, as a sum -.92 and -1.02."""
    model = table(p=(0.4, 0.4, 0.2), p1=(0.9, 0.05, 0.05))
    assert search([model], 2, 2, length_penalty=1.0) == [[1, EOS]]
    assert search([model], 2, 2, length_penalty=0.0)[0][0] == EOS


def test_what_has_not_ended_at_the_limit_counts_as_ended():
    never = table(p=(0.0, 0.6, 0.4), p1=(0.0, 0.1, 0.9), p2=(0.0, 0.5, 0.5), p12=(0.0, 1.0, 0.0))
    assert search([never], 2, 3) == [[1, 2, 1]]


def test_rows_are_searched_apart_and_padded_with_ends():
    short, long = table(p=(0.9, 0.05, 0.05)), table(p=(0.0, 0.9, 0.1), p1=(0.0, 0.1, 0.9), p12=(0.0, 1.0, 0.0))
    together = search([short, long, GARDEN_PATH], 3, 4)
    assert together == [[EOS] * 4, [1, 2, 1, EOS], [2, EOS, EOS, EOS]]
    for row, model in zip(together, (short, long, GARDEN_PATH), strict=True):
        (alone,) = search([model], 3, 4)
        assert row[: len(alone)] == alone and set(row[len(alone) :]) <= {EOS}


def random_model(seed: int, vocab_size: int) -> Callable[[Prefix], Tensor]:
    """Logits of every prefix by a hash of it."""

    def model(prefix: Prefix) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *prefix)) % 2**31)
        return 2 * torch.randn(vocab_size, generator=generator, dtype=torch.float64)

    return model


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
def test_beams_enough_for_all_prefixes_find_the_best_of_all_sequences(length_penalty: float):
    vocab_size, max_tokens = 3, 4
    models = [random_model(seed, vocab_size) for seed in range(12)]
    found = search(models, vocab_size**max_tokens, max_tokens, length_penalty)
    sequences = [
        (*body, EOS) for length in range(max_tokens) for body in itertools.product(range(1, vocab_size), repeat=length)
    ] + list(itertools.product(range(1, vocab_size), repeat=max_tokens))
    for model, row in zip(models, found, strict=True):
        scores = {}
        for sequence in sequences:
            steps = [model(sequence[:i]).log_softmax(0)[token] for i, token in enumerate(sequence)]
            scores[sequence] = float(sum(steps)) / len(sequence) ** length_penalty
        best = max(scores, key=lambda sequence: scores[sequence])
        assert tuple(row) == (*best, *[EOS] * (len(row) - len(best)))
    assert len({tuple(row) for row in found}) > 3


@pytest.mark.parametrize(("num_beams", "length_penalty"), [(2, 1.0), (4, 1.0), (3, 0.0), (3, 2.0)])
def test_as_transformers_searches(num_beams: int, length_penalty: float):
    """Parity with `generate(num_beams=..., early_stopping="never")` of transformers 4.57 on random language models."""
    vocab_size, max_tokens, begin = 12, 7, 5
    different = 0
    for seed in range(4):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.4,
            eos_token_id=EOS,
            pad_token_id=EOS,
            bos_token_id=begin,
        )
        network = Qwen2ForCausalLM(config).eval()

        @torch.no_grad()
        def model(prefix: Prefix, network: Qwen2ForCausalLM = network) -> Tensor:
            return network(torch.tensor([[begin, *prefix]])).logits[0, -1]

        def generate(beams: int, network: Qwen2ForCausalLM = network) -> list[int]:
            more = {"early_stopping": "never", "length_penalty": length_penalty} if beams > 1 else {}
            prompt = torch.tensor([[begin]])
            ids = network.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                num_beams=beams,
                max_new_tokens=max_tokens,
                do_sample=False,
                **more,
            )
            return ids[0, 1:].tolist()

        expected = generate(num_beams)
        (found,) = search([model], num_beams, max_tokens, length_penalty)
        longest = max(len(found), len(expected))
        assert found + [EOS] * (longest - len(found)) == expected + [EOS] * (longest - len(expected))
        different += expected != generate(1)
    assert different > 0  # beams matter here
