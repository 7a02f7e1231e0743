"""Adapters to Composer, which logs one scalar a metric: named entries of a metric that computes several."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from recipe.schema import LossCounts


class MetricEntry(Metric):
    """One scalar of a metric whose `compute` returns a dict. Entries share their source, which is computed once.

    Args:
        source: The metric.
        key: Which of its values.
        owns: Only the owning entry passes updates on.
    """

    full_state_update = False

    def __init__(self, source: Metric, key: str, owns: bool):
        super().__init__()
        self.source = source
        self.key = key
        self.owns = owns

    def update(self, *args: Any) -> None:
        """Updates the source, once for all its entries."""
        if self.owns:
            self.source.update(*args)

    def compute(self) -> Tensor:
        """The entry's value, over all ranks."""
        return self.source.compute()[self.key]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.source.reset()


def metric_entries(source: Metric, names: Sequence[str]) -> Iterator[tuple[str, MetricEntry]]:
    """The entries `names` of one source; the first owns it."""
    for position, name in enumerate(names):
        yield name, MetricEntry(source, name, owns=position == 0)


class LossAverage(Metric):
    """The loss terms over a whole evaluation set: summed numerators over summed counts, over all batches and ranks."""

    full_state_update = False
    denominators: ClassVar[Mapping[str, str]] = {
        "loss_lm_teacher": "teacher_tokens",
        "loss_lm_student": "student_tokens",
        "loss_bbox": "objects",
        "loss_giou": "objects",
        "loss_objectness": "images",
        "loss_caption": "images",
    }

    sums: Tensor
    counts: Tensor

    def __init__(self):
        super().__init__()
        size = len(self.denominators)
        self.add_state("sums", default=torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", default=torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss_sums: Mapping[str, Tensor], counts: LossCounts) -> None:
        """Adds one batch: terms not divided yet, and what they are to be divided by."""
        self.sums += torch.stack([loss_sums[name].detach().to(self.sums) for name in self.denominators])
        self.counts += self.counts.new_tensor([counts[name] for name in self.denominators.values()])

    def compute(self) -> dict[str, Tensor]:
        """Each term's average; 0 where nothing was counted."""
        averages = self.sums / self.counts.clamp(min=1)
        return dict(zip(self.denominators, averages.float().unbind(), strict=True))
