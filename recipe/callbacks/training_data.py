"""Watch the training data: the length of the epoch, what was read, how full packs are, what was skipped."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from composer import Callback
from composer.core import State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DataLoader

from recipe.data.contents import epoch_tokens
from recipe.data.stream import PackStream
from recipe.optim.schedule import Schedule, trunk_learns, trunk_thaws_later
from recipe.schema import Batch
from recipe.upstream.torch_private import restart_workers

log = logging.getLogger(__name__)

SIMILAR = 0.02  # relative: epochs of one kind differ a little in their packs
SKIPPED_FILE = "skipped_samples.jsonl"


class TrainingData(Callback):
    """Keeps the Trainer's epoch length right, logs what each step read, and bounds the number of skipped samples.

    The number of packs differs between epochs, and the Trainer would cut off an epoch that is longer than it expects.
    While the trunk is frozen, answers teach nothing: an epoch that begins then is read without them.

    The planned tokens of a step are logged when they change: an epoch without answers has others.

    Logged per step, over all ranks: `data/samples`, `data/packs` and `data/tokens` of the step, `data/samples_seen`
    since the start, `data/packing_fill` (share of the packs' token budget), `data/skipped_samples` since the start,
    each counted once, and `train/unmatched_objects`: objects of the step beyond their image's queries, which teach
    nothing.

    Args:
        max_tokens: Per pack; None: not packed.
        max_bad_samples: One more skipped sample, over all ranks, stops the run.
        folder: Gets the id and reason of every skipped sample.
        num_queries: The most objects that the head finds in one image.
        schedule: Says in which epochs the trunk learns; others are read without answers. None: all have answers.
    """

    def __init__(
        self,
        max_tokens: int | None,
        max_bad_samples: int,
        folder: str | Path,
        num_queries: int,
        schedule: Schedule | None = None,
    ):
        self.max_tokens = max_tokens
        self.schedule = schedule
        self._step_tokens: float | None = None  # planned, the last that was logged
        self._logged = True  # the last `with_answers` that was logged; at first, that of most runs
        self._warned = False
        self.num_queries = num_queries
        self.max_bad_samples = max_bad_samples
        self.path = Path(folder) / SKIPPED_FILE
        self.num_samples = 0
        self.skipped: set[str] = set()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Set the epoch length, since no epoch starts after a resume."""
        self.epoch_start(state, logger)

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Set the length of the epoch that begins."""
        assert isinstance(state.dataloader, DataLoader)
        dataset = state.dataloader.dataset
        assert isinstance(dataset, PackStream)
        dataset.epoch_of_length = epoch = int(state.timestamp.epoch)
        if int(state.timestamp.batch_in_epoch) == 0:  # else the checkpoint has said it
            self._choose_answers(state, state.dataloader, dataset)
        self._log_answers(epoch, dataset)
        state.dataloader_len = len(state.dataloader)
        if dist.get_global_rank() == 0:
            self._log_step_tokens(epoch, dataset)
        num_left_out = len(dataset.plan(epoch).left_out)
        if num_left_out and dist.get_global_rank() == 0:
            log.warning("epoch %d: %d samples exceed the budget of a pack and are left out", epoch, num_left_out)

    def _choose_answers(self, state: State, loader: DataLoader, dataset: PackStream) -> None:
        """Decide whether the epoch that begins reads answers: the trunk learns from them, and nothing else does."""
        before = dataset.with_answers
        dataset.with_answers = True
        if self.schedule is not None and not trunk_learns(self.schedule, state, whole_epochs=True):
            dataset.with_answers = False
            # A stage that begins within the last epoch would find no later one with answers.
            dataset.with_answers = trunk_thaws_later(self.schedule, state) and _is_last_epoch(state, loader, dataset)
        if dataset.with_answers != before:
            restart_workers(loader)

    def _log_answers(self, epoch: int, dataset: PackStream) -> None:
        if dataset.with_answers != self._logged and dist.get_global_rank() == 0:
            log.info(
                "from epoch %d on training reads answers: the trunk learns from them"
                if dataset.with_answers
                else "from epoch %d on training leaves answers out, as the trunk is frozen; evaluation reads them "
                "(prompt.student_answer)",
                epoch,
            )
        self._logged = dataset.with_answers

    def _log_step_tokens(self, epoch: int, dataset: PackStream) -> None:
        tokens = epoch_tokens(dataset, epoch, dataset.with_answers)
        if tokens is None:
            return
        before, packs = self._step_tokens, (dataset.batch_size or 1) * dist.get_world_size()
        now = tokens / dataset.plan(epoch).num_packs * packs
        if before is not None and abs(now / before - 1) <= SIMILAR:
            return
        self._step_tokens = now
        if before is not None:
            text = "from epoch %d on a step reads %.0f tokens, before %.0f; learning rates do not follow"
            log.info(text, epoch, now, before)

    def _warn_of_missing_answers(self, schedule: Schedule, state: State) -> None:
        assert isinstance(state.dataloader, DataLoader) and isinstance(state.dataloader.dataset, PackStream)
        if state.dataloader.dataset.with_answers or not trunk_learns(schedule, state):
            return
        self._warned = True
        if dist.get_global_rank() == 0:
            log.warning(
                "the trunk learns from batch %d on, but answers are read from epoch %d on: let its stage begin with an "
                "epoch (such as from: 1ep), or set prompt.student_answer=true",
                int(state.timestamp.batch),
                int(state.timestamp.epoch) + 1,
            )

    def batch_start(self, state: State, logger: Logger) -> None:
        """Count the batch over all ranks; raise RuntimeError on every rank after too many skipped samples."""
        if self.schedule is not None and not self._warned:
            self._warn_of_missing_answers(self.schedule, state)
        batches: list[Batch] = state.batch
        skipped = {name: reason for batch in batches for name, reason in batch["skipped"].items()}
        counts = [sum(batch[name] for batch in batches) for name in ("num_samples", "num_packs", "num_tokens")]
        counts += [len(skipped), num_unmatched(batches, self.num_queries)]
        sums = state.device.tensor_to_device(torch.tensor(counts, dtype=torch.float64))
        dist.all_reduce(sums)
        samples, packs, tokens, num_skipped, unmatched = (int(value) for value in sums.tolist())
        self.num_samples += samples
        if num_skipped:
            self._report(skipped)
        metrics: dict[str, float] = {
            "data/samples": samples,
            "data/packs": packs,
            "data/tokens": tokens,
            "data/samples_seen": self.num_samples,
            "data/skipped_samples": len(self.skipped),
            "train/unmatched_objects": unmatched,
        }
        if self.max_tokens is not None and packs:
            metrics["data/packing_fill"] = tokens / (packs * self.max_tokens)
        logger.log_metrics(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, which continue after a resume."""
        return {"num_samples": self.num_samples, "skipped": sorted(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts."""
        self.num_samples, self.skipped = state["num_samples"], set(state["skipped"])

    def _report(self, skipped: dict[str, str]) -> None:
        found = {name: reason for part in dist.all_gather_object(skipped) for name, reason in part.items()}
        new = {name: reason for name, reason in found.items() if name not in self.skipped}  # else in an earlier epoch
        self.skipped |= new.keys()
        if dist.get_global_rank() == 0:
            for reason in new.values():
                log.warning("skipped a sample: %s", reason)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    for name, reason in new.items():
                        file.write(json.dumps({"id": name, "reason": reason}, ensure_ascii=False) + "\n")
            except OSError as error:  # the other ranks continue
                log.error("cannot write %s: %s; training continues: free disk space", self.path.name, error)
        if new and len(self.skipped) > self.max_bad_samples:
            raise RuntimeError(
                f"{len(self.skipped)} samples could not be used, above train_loader.max_bad_samples "
                f"{self.max_bad_samples}; the last: {'; '.join(new.values())}. They are listed in {self.path}: "
                "fix the data set, or raise train_loader.max_bad_samples"
            )


def _is_last_epoch(state: State, loader: DataLoader, dataset: PackStream) -> bool:
    """Return whether the run ends no later than the epoch that begins."""
    plan, end = dataset.plan(dataset.epoch_of_length), state.max_duration
    assert end is not None
    lengths = {TimeUnit.EPOCH: 1, TimeUnit.BATCH: len(loader), TimeUnit.SAMPLE: plan.num_packs}
    lengths[TimeUnit.TOKEN] = int(plan.tokens.sum())
    return end.unit in lengths and state.timestamp.get(end.unit).value + lengths[end.unit] >= end.value


def num_unmatched(batches: Iterable[Batch], num_queries: int) -> int:
    """Return the number of objects without a query: the matching gives each query at most one object."""
    objects = [len(target["boxes"]) for batch in batches for target in batch["targets"] if target is not None]
    return sum(max(0, count - num_queries) for count in objects)
