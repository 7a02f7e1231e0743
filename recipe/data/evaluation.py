"""The evaluation set, in stored order."""

from collections.abc import Iterator
from typing import Any

from composer.utils import dist
from torch.utils.data import Dataset, DistributedSampler

from recipe.data.storage import CheckedDataset
from recipe.data.stream import ExampleMaker, make_inert
from recipe.schema import Example


class EvalSamples(Dataset[Example]):
    """An evaluation set in stored order; item `-1 - i` is sample `i` made inert, which no loss or metric counts."""

    def __init__(self, maker: ExampleMaker, **keywords: Any):
        """Opens the shards.

        Args:
            maker: Row → Example.
            **keywords: Of `streaming.StreamingDataset`.
        """
        self._rows = CheckedDataset(**keywords)
        self._maker = maker

    def __len__(self) -> int:
        return self._rows.num_samples

    def __getitem__(self, index: int) -> Example:
        position = index if index >= 0 else -1 - index
        example = self._maker(self._rows[position], 0, position)
        return example if index >= 0 else make_inert(example)


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
