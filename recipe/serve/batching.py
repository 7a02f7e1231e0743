"""Requests that wait for the model, answered in batches of equal questions within a budget of tokens."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from recipe.inference.predictor import Predictor
from recipe.schema import Example, Prediction

Predict = Callable[[Sequence[Example], Predictor], Sequence[Prediction | str]]


@dataclass(eq=False)
class _Waiting:
    example: Example
    predictor: Predictor
    answer: asyncio.Future[Prediction | str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Answers images in the order in which they come; those that ask the same share a batch.

    A batch starts as soon as the model is free: an image alone does not wait for company. Under load the next one
    collects what came while the model ran.

    Args:
        predict: Of a batch, a prediction or the reason that there is none per example; called in a thread of its own.
        max_images: Of a batch.
        max_tokens: Of a batch, as it is padded; an image of more tokens is a batch of its own.
        observe: Called with the images of each batch.
    """

    def __init__(
        self, predict: Predict, max_images: int, max_tokens: int, observe: Callable[[int], object] = lambda images: None
    ):
        self._predict, self._max_images, self._max_tokens, self._observe = predict, max_images, max_tokens, observe
        self._waiting = deque[_Waiting]()
        self._has_work = asyncio.Event()
        self._model = ThreadPoolExecutor(1, "model")

    async def answer(self, example: Example, predictor: Predictor) -> Prediction | str:
        """Return the prediction, or why there is none; if it is cancelled before its batch starts, it costs nothing."""
        entry = _Waiting(example, predictor)
        self._waiting.append(entry)
        self._has_work.set()
        return await entry.answer

    async def run(self) -> None:
        """Answer what comes, until cancelled."""
        while True:
            await self._has_work.wait()
            batch = self._next_batch()
            if batch:
                await self._answer(batch)
            else:
                self._has_work.clear()

    def _next_batch(self) -> list[_Waiting]:
        """Take the oldest request and those that fit with it."""
        while self._waiting and self._waiting[0].answer.done():  # its client has left
            self._waiting.popleft()
        batch, others, longest = list[_Waiting](), deque[_Waiting](), 0
        while self._waiting and len(batch) < self._max_images:
            entry = self._waiting.popleft()
            if entry.answer.done():
                continue
            length = max(longest, len(entry.example.input_ids))
            fits = not batch or (
                entry.predictor is batch[0].predictor and length * (len(batch) + 1) <= self._max_tokens
            )
            if fits:
                batch.append(entry)
                longest = length
            else:
                others.append(entry)
        self._waiting.extendleft(reversed(others))
        return batch

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        self._observe(len(batch))
        examples, loop = [entry.example for entry in batch], asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._model, self._predict, examples, batch[0].predictor)
        except Exception as error:
            if len(batch) > 1:  # only the one that caused it must fail
                for entry in batch:
                    await self._answer([entry])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for entry, result in zip(batch, found, strict=True):
            if not entry.answer.done():
                entry.answer.set_result(result)
