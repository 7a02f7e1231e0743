"""MDS shards → Examples: the training stream, and the evaluation set in stored order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from torch.utils.data import Dataset, DistributedSampler

from recipe.config import TeacherConfig
from recipe.data.draws import noise_seed
from recipe.data.encode import Encoder
from recipe.data.teachers import TeacherPool
from recipe.schema import Example, Sample

INDEX_FILE = "index.json"


def open_streams(streams: Mapping[str, Mapping[str, Any]]) -> list[Stream]:
    """Makes the streams of a yaml's section, each from `streaming.Stream` keywords.

    Raises:
        ValueError: There is none, or a local folder holds no converted data set.
    """
    if not streams:
        raise ValueError("no stream is given: name at least one under `streams`")
    for name, keywords in streams.items():
        source = keywords.get("remote") or keywords.get("local")
        if not source:
            raise ValueError(f"stream {name!r} has neither `local` nor `remote`: give the folder that convert/ wrote")
        if "://" in source:
            continue
        folder = Path(source, keywords.get("split") or "")
        if not (folder / INDEX_FILE).is_file():
            state = f"holds no {INDEX_FILE}" if folder.is_dir() else "does not exist"
            raise ValueError(
                f"stream {name!r}: the folder {folder} {state}: convert a data set into it first, "
                "with `python -m convert.coco|voc|jsonl|shapes --out DIR --split SPLIT`"
            )
    return [Stream(**keywords) for keywords in streams.values()]


def read_teachers(config: TeacherConfig, seed: int) -> TeacherPool | None:
    """Reads the whole teacher pool into memory; None where the yaml asks for no teachers.

    Raises:
        ValueError: Teachers are asked for without a pool, or the pool cannot serve.
    """
    if config.num_teachers == 0:
        return None
    if config.stream is None:
        raise ValueError(f"teachers.num_teachers is {config.num_teachers}, but teachers.stream is null: name a pool")
    rows = StreamingDataset(streams=open_streams({"teachers": config.stream}), batch_size=1)
    return TeacherPool([Sample.from_mds(rows[index]) for index in range(rows.num_samples)], config, seed)


@dataclass(frozen=True)
class ExampleMaker:
    """Row → Example, with the teachers and noise of its place in the data and in time."""

    encoder: Encoder
    teachers: TeacherPool | None
    seed: int

    def __call__(self, row: Mapping[str, Any], epoch: int, position: int) -> Example:
        """Teachers are shown with the detection chat only, not with a sample's own `messages`."""
        sample = Sample.from_mds(row)
        shown = []
        if self.teachers is not None and sample.messages is None and sample.image:
            shown = self.teachers.draw(epoch, position, sample.id)
        return replace(self.encoder(sample, shown), noise_seed=noise_seed(self.seed, epoch, position))


class SampleStream(StreamingDataset):
    """The training set: Streaming's order, partition and resumption; its items are Examples."""

    def __init__(self, maker: ExampleMaker, **keywords: Any):
        """Opens the shards.

        Args:
            maker: Row → Example.
            **keywords: Of `streaming.StreamingDataset`.
        """
        super().__init__(**keywords)
        self._maker = maker
        self._epoch = 0

    def __getitem__(self, at: Any) -> Any:
        """The Example of one row; what it is shown depends on the epoch that is being read."""
        return self._maker(super().__getitem__(at), self._epoch, int(at))

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        # The one place where Streaming tells an iterator, in its own worker, which epoch it reads.
        self._epoch = epoch
        return super()._get_work(epoch, sample_in_epoch)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Streaming's state, mended: at an epoch's end the next epoch begins, instead of the finished one anew."""
        state = super().state_dict(num_samples, from_beginning)
        if num_samples == 0 and from_beginning:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state


class EvalSamples(Dataset[Example]):
    """An evaluation set in stored order; item `-1 - i` is sample `i` made inert, which no loss or metric counts."""

    def __init__(self, maker: ExampleMaker, **keywords: Any):
        """Opens the shards.

        Args:
            maker: Row → Example.
            **keywords: Of `streaming.StreamingDataset`.
        """
        self._rows = StreamingDataset(**keywords)
        self._maker = maker

    def __len__(self) -> int:
        return self._rows.num_samples

    def __getitem__(self, index: int) -> Example:
        position = index if index >= 0 else -1 - index
        example = self._maker(self._rows[position], 0, position)
        return example if index >= 0 else make_inert(example)


def make_inert(example: Example) -> Example:
    """The same pictures and tokens with nothing to learn or to score: keeps ranks in step, counts for nothing."""
    return replace(
        example,
        sample=replace(example.sample, objects=None, messages=None),
        roles=torch.zeros_like(example.roles),
        target=None,
    )


class EvalSampler(DistributedSampler):
    """Rank r of W reads r, r + W, ...; short ranks are filled with inert items, so that all take as many steps."""

    def __init__(self, dataset: EvalSamples):
        """Splits `dataset` over Composer's ranks."""
        super().__init__(dataset, num_replicas=dist.get_world_size(), rank=dist.get_global_rank(), shuffle=False)
        # Composer cuts `total_size - len(dataset)` samples off the last batch: here there is nothing to cut.
        self.total_size = len(dataset)

    def __iter__(self) -> Iterator[int]:
        size = self.total_size
        for step in range(self.num_samples):
            index = step * self.num_replicas + self.rank
            yield index if index < size else -1 - index % size
