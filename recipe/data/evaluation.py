"""The evaluation set: every sample once, over all ranks, beginning with those that get a text answer.

`evaluation.answers` is how many are answered at each evaluation of a training run. Of the samples whose answer counts,
those with the lowest hashes of their ids are chosen. So the order of the data, the number of ranks and the batch size
change none, a resume changes none, and other samples move few. They are evaluated first, which fills batches with them:
a batch is answered in about the time of its longest answer.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from composer import DataSpec
from composer.utils import dist
from jaxtyping import Int64
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from recipe.boxes import asks_for_boxes
from recipe.config import AnswersConfig
from recipe.data.kept import KeptCount, MissingRecordsError, concatenated
from recipe.data.maker import ExampleMaker, make_inert
from recipe.data.mapped import Arrays
from recipe.data.split import Split
from recipe.data.teachers import id_hash
from recipe.schema import Example, Pack, Sample
from recipe.upstream.agreement import from_rank_0
from recipe.upstream.checked_stream import CheckedStream
from recipe.upstream.storage import CheckedDataset

NEVER = 2**63 - 1
ALL = NEVER - 1


def answer_order(sample: Sample) -> int:
    """Return a number whose lowest are answered, of the id alone; `NEVER` if no score reads the answer."""
    counts = any(view.objects is not None and view.has_image and asks_for_boxes(view) for view in sample.per_image())
    return id_hash(sample.id) if counts else NEVER


class EvalSamples(Dataset[Pack]):
    """An evaluation set in stored order, one sample per pack; item `-1 - i` is sample `i` made inert.

    `put_first` changes the order. With a `split` the set is that part of the stored samples, and with `max_samples` no
    more than the first ones. A sample that cannot be used raises, or is listed in `Pack.skipped` with an inert one in
    its place.
    """

    def __init__(
        self,
        maker: ExampleMaker,
        skips_bad_samples: bool = False,
        split: Split | None = None,
        max_samples: int | None = None,
        *,
        streams: Sequence[CheckedStream],
        **keywords: Any,
    ):
        self._streams, self._rows = streams, CheckedDataset(streams=streams, **keywords)
        self._maker, self._skips_bad_samples = maker, skips_bad_samples
        positions = np.arange(self._rows.num_samples) if split is None else np.flatnonzero(split.is_validation)
        self._positions = positions[:max_samples]

    def __len__(self) -> int:
        return len(self._positions)

    def answer_orders(self) -> Int64[np.ndarray, " N"]:
        """Return the `answer_order` of every sample; if a stream has no records, all samples are read."""
        try:
            kept = [_KEPT_ORDERS.of(stream)["orders"] for stream in self._streams]
        except MissingRecordsError:
            rows = (self._rows[position] for position in self._positions.tolist())
            return _orders_of(Sample.from_mds({**row, "image": b""}) for row in rows)["orders"]
        return np.concatenate(kept)[self._positions]

    def has_answers(self) -> bool:
        """Return whether any sample has an answer token; reads samples until one has."""
        return any(bool(example.roles.any()) for index in range(len(self)) for example in self[index].examples)

    def put_first(self, indices: Int64[np.ndarray, " k"]) -> None:
        """Let the set begin with these of its samples; the others keep their order."""
        self._positions = np.concatenate([self._positions[indices], np.delete(self._positions, indices)])

    def __getitem__(self, index: int) -> Pack:
        position = int(self._positions[index if index >= 0 else -1 - index])
        row = self._rows[position]
        try:
            example = self._maker(row, 0, position)
        except ValueError as error:
            if not self._skips_bad_samples:
                raise
            return Pack(position, [self._find_filler()], {row["id"]: str(error)}, is_inert=True)
        return Pack(position, [example]) if index >= 0 else Pack(position, [make_inert(example)], is_inert=True)

    def _find_filler(self) -> Example:
        """Return an inert example without an image to draw, in place of a sample that is skipped."""
        for position in self._positions.tolist():
            with suppress(ValueError):
                filler = make_inert(self._maker(self._rows[position], 0, position))
                return replace(filler, sample=filler.sample.without_bytes())
        raise ValueError("no sample of the evaluation set can be used: convert it again, with --strict to see why")


class EvalSampler(DistributedSampler):
    """Rank r of W reads r, r + W, ...; inert items fill short ranks, so that all take equally many steps."""

    def __init__(self, dataset: EvalSamples):
        super().__init__(dataset, num_replicas=dist.get_world_size(), rank=dist.get_global_rank(), shuffle=False)
        # Composer cuts `total_size - len(dataset)` samples off the last batch: here, none.
        self.total_size = len(dataset)

    def __iter__(self) -> Iterator[int]:
        for index in range(self.rank, self.num_samples * self.num_replicas, self.num_replicas):
            yield index if index < self.total_size else -1 - index % self.total_size


def put_answered_first(loader: DataSpec, answers: AnswersConfig | None, num_batches: int | None = None) -> int | None:
    """Let an evaluation begin with the samples that are answered, in stored order; all ranks must call it.

    If a stream has no records, all samples are read once, on the first rank.

    Args:
        loader: Of `build_eval_loader`, not yet iterated over.
        answers: How many are answered; None: none, and the order stays.
        num_batches: Choose among those of the first batches, as an evaluation reads no more; -1 or None: all.

    Returns:
        The greatest `answer_order` that is answered; `ALL` if no sample is left, -1 if there is none. None without
        `answers`.
    """
    if answers is None:
        return None
    assert isinstance(loader.dataloader, DataLoader) and loader.dataloader.batch_size is not None
    samples = loader.dataloader.dataset
    assert isinstance(samples, EvalSamples)
    among = None if num_batches in (None, -1) else num_batches * loader.dataloader.batch_size * dist.get_world_size()
    orders = from_rank_0(samples.answer_orders)[:among]
    counted = int((orders < NEVER).sum())
    chosen = np.sort(np.argsort(orders, kind="stable")[: min(answers.images, counted)])
    samples.put_first(chosen)
    if not counted:
        return -1
    return ALL if len(chosen) == counted else int(orders[chosen].max())


def _orders_of(samples: Iterable[Sample]) -> Arrays:
    return {"orders": np.array([answer_order(sample) for sample in samples], dtype=np.int64)}


_KEPT_ORDERS = KeptCount(
    name="answer_orders",
    fingerprint="1",
    what="the images to answer",
    remedy="set evaluation.answers=null",
    count=_orders_of,
    join=concatenated,
)
