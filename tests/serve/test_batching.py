"""Which requests share a batch, and that one never costs another its answer."""

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from recipe.serve.batching import Batcher

PREDICTOR: Any = "p"


def example(name: str, length: int = 10) -> Any:
    return SimpleNamespace(name=name, input_ids=range(length))


class Model:
    """Answers with names in capitals; `gate` holds its first batch back."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()

    def __call__(self, examples: Sequence[Any], predictor: Any) -> list[Any]:
        self.batches.append([item.name for item in examples])
        assert self.gate.wait(10)
        if any(item.name == "bad" for item in examples):
            raise RuntimeError("no answer to this")
        return [f"{item.name.upper()} {predictor}" for item in examples]


def serve(model: Model, asked: Sequence[tuple[Any, str]], max_images: int = 3, max_tokens: int = 100) -> list[Any]:
    """Ask everything while the first batch runs; the answers."""
    predictors: dict[str, Any] = {name: name for _, name in asked}

    async def main() -> list[Any]:
        batcher = Batcher(model, max_images, max_tokens)
        work = asyncio.create_task(batcher.run())
        answers = [asyncio.create_task(batcher.answer(item, predictors[name])) for item, name in asked]
        while not model.batches:
            await asyncio.sleep(0.001)
        for answer, (item, _) in zip(answers, asked, strict=True):
            if item.name.startswith("gone"):
                answer.cancel()
        await asyncio.sleep(0.01)
        model.gate.set()
        found = await asyncio.gather(*answers, return_exceptions=True)
        work.cancel()
        return found

    return asyncio.run(main())


def test_equal_questions_share_a_batch_in_their_order() -> None:
    model = Model()
    found = serve(model, [(example(name), "p" if name in "abdfg" else "q") for name in "abcdefgh"])
    assert found == [f"{name.upper()} {'p' if name in 'abdfg' else 'q'}" for name in "abcdefgh"]
    assert model.batches == [["a", "b", "d"], ["c", "e", "h"], ["f", "g"]]


def test_a_batch_is_within_its_tokens_when_it_is_padded() -> None:
    model = Model()
    lengths = {"a": 10, "b": 40, "c": 50, "d": 10, "e": 200, "f": 10}
    serve(model, [(example(name, length), "p") for name, length in lengths.items()])
    # a + b + d would be three times 40; e is over the budget alone
    assert model.batches == [["a", "b"], ["c", "d"], ["e"], ["f"]]


def test_who_has_left_costs_nothing() -> None:
    model = Model()
    names = ["first", "second", "third", "gone", "fourth", "gone too"]
    found = serve(model, [(example(name), "p") for name in names])
    assert [isinstance(answer, asyncio.CancelledError) for answer in found] == [False, False, False, True, False, True]
    assert model.batches == [["first", "second", "third"], ["fourth"]]


def test_only_the_request_that_fails_fails() -> None:
    model = Model()
    found = serve(model, [(example(name), "p") for name in ("a", "bad", "c", "d")])
    assert (found[0], found[2], found[3]) == ("A p", "C p", "D p")
    assert isinstance(found[1], RuntimeError)
    assert model.batches == [["a", "bad", "c"], ["a"], ["bad"], ["c"], ["d"]]


def test_an_image_alone_does_not_wait() -> None:
    async def main() -> tuple[Any, list[int]]:
        sizes: list[int] = []
        batcher = Batcher(lambda examples, _: ["found" for _ in examples], 8, 100, sizes.append)
        work = asyncio.create_task(batcher.run())
        answer = await asyncio.wait_for(batcher.answer(example("a"), PREDICTOR), 5)
        work.cancel()
        return answer, sizes

    assert asyncio.run(main()) == ("found", [1])


@pytest.mark.parametrize("reason", ["it does not fit on the GPU"])
def test_a_reason_is_an_answer(reason: str) -> None:
    async def main() -> Any:
        batcher = Batcher(lambda examples, _: [reason for _ in examples], 8, 100)
        work = asyncio.create_task(batcher.run())
        answer = await batcher.answer(example("a"), PREDICTOR)
        work.cancel()
        return answer

    assert asyncio.run(main()) == reason
