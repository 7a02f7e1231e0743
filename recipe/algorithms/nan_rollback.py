"""Skip a batch that would spoil the weights, go back to the last good ones where it already has, and clip gradients.

One small all-reduce a step tells every rank the same numbers, so all do the same, before the optimizer moves.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, Event, Logger, State, Time
from composer.utils import dist
from torch import Tensor

from recipe.algorithms.norms import is_sharded, local, named_groups, square_sums
from recipe.algorithms.quarantine import AuditEntry, Quarantine
from recipe.algorithms.snapshot import Snapshot, weights_are_finite
from recipe.algorithms.watch import Action, MicrobatchFlags, Reading, Watch, head_outputs
from recipe.config import NaNRollbackConfig
from recipe.upstream.torch_private import foreach_mul_

log = logging.getLogger(__name__)


class TrainingDiverged(Exception):
    """Going on is pointless; raised on all ranks at once."""


class NaNRollback(Algorithm):
    """Guards the weights against what is not finite, and clips the gradient; must be the last of the algorithms.

    Composer calls the last algorithm first after the backward pass. A step on which a loss term, an output of the head
    or a gradient is not finite, on any rank, is no step: no gradient is left, so the optimizer neither moves nor decays
    nor counts. After `strikes` of them in a row, or where a weight is not finite, the last snapshot is restored, and
    learning rates and clip norm are cut for good. Neither time, nor data, nor random states are turned back.

    Logs `gradient_norm/{group}` and `gradient_norm/total` at every step, before clipping; and when it acts
    `nan_rollback/skipped_batches`, `nan_rollback/rollbacks` and `nan_rollback/clip_scale`.

    Attributes:
        gradient_norms: Of the last step, of every group and `total`.
        clip_scale: Factor on the clip norm, of all cuts.
        num_skipped: Batches that were no step.
        num_rollbacks: Snapshots restored.

    Args:
        config: When to do what.
        clip_norm: Largest norm of the whole gradient; None: any.
        folder: Gets the audit of bad batches.
    """

    def __init__(self, config: NaNRollbackConfig, clip_norm: float | None, folder: str | Path):
        self.config = config
        self.clip_norm = clip_norm
        self.clip_scale = 1.0
        self.snapshot_interval = int(Time.from_timestring(config.snapshot_interval))
        self.watch = Watch(config)
        self.quarantine = Quarantine(folder, config.quarantine_after)
        self.snapshot = Snapshot()
        self.gradient_norms: dict[str, float] = {}
        self.num_skipped = 0
        self.num_rollbacks = 0
        self._strikes = 0
        self._recently_skipped: list[int] = []
        self._is_saved = False
        self._batch, self._epoch = 0, 0
        self._microbatches: list[MicrobatchFlags] = []
        self._losses: list[Tensor] = []

    def match(self, event: Event, state: State) -> bool:
        """Whether there is something to do."""
        return event in (
            Event.FIT_START,
            Event.EPOCH_START,
            Event.BATCH_START,
            Event.BEFORE_TRAIN_BATCH,
            Event.AFTER_FORWARD,
            Event.AFTER_LOSS,
            Event.AFTER_TRAIN_BATCH,
            Event.BATCH_END,
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """See the class.

        Raises:
            TrainingDiverged: On all ranks: a bound is reached, or training starts from weights that are not finite.
        """
        if event is Event.FIT_START:
            self._begin(state)
        elif event is Event.EPOCH_START:
            self.quarantine.begin_epoch()
            self.quarantine.apply(state)
        elif event is Event.BATCH_START:
            self._begin_batch(state)
        elif event is Event.BEFORE_TRAIN_BATCH:
            self._microbatches.clear()
            self._losses.clear()
        elif event is Event.AFTER_FORWARD:
            self._flag_outputs(state)
        elif event is Event.AFTER_LOSS:
            self._flag_losses(state)
        elif event is Event.AFTER_TRAIN_BATCH:
            self._decide(state, logger)
        elif event is Event.BATCH_END:
            self._end_batch(state, logger)

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on, as one text: a sharded checkpoint drops what a new run's state lacks."""
        # A run resumed from this checkpoint has its weights for a snapshot, so this run takes one too.
        self._is_saved = True
        state = {
            "clip_scale": self.clip_scale,
            "num_skipped": self.num_skipped,
            "num_rollbacks": self.num_rollbacks,
            "strikes": self._strikes,
            "recently_skipped": self._recently_skipped,
            "readings": self.watch.state_dict(),
            "quarantine": self.quarantine.state_dict(),
        }
        return {**super().state_dict(), "state": json.dumps(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the saved run was."""
        saved = json.loads(state["state"])
        self.clip_scale = saved["clip_scale"]
        self.num_skipped = saved["num_skipped"]
        self.num_rollbacks = saved["num_rollbacks"]
        self._strikes = saved["strikes"]
        self._recently_skipped = saved["recently_skipped"]
        self.watch.load_state_dict(saved["readings"])
        self.quarantine.load_state_dict(saved["quarantine"])

    def _begin(self, state: State) -> None:
        self.quarantine.apply(state)
        if not weights_are_finite(state):
            raise TrainingDiverged(
                f"the weights that training starts from, at batch {int(state.timestamp.batch)}, are not finite: "
                "start from an earlier checkpoint"
            )
        self.snapshot.take(state)
        self._is_saved = False

    def _begin_batch(self, state: State) -> None:
        self._batch, self._epoch = int(state.timestamp.batch), int(state.timestamp.epoch)
        if self._is_saved:
            self._is_saved = False
            if self.snapshot.batch != self._batch and weights_are_finite(state):
                self.snapshot.take(state)
        if anomaly := self.config.detect_anomaly:
            done = self._batch - int(Time.from_timestring(anomaly.start))
            torch.autograd.set_detect_anomaly(0 <= done < anomaly.batches)

    def _end_batch(self, state: State, logger: Logger) -> None:
        if self.config.detect_anomaly:
            torch.autograd.set_detect_anomaly(False)
        if int(state.timestamp.batch) % self.snapshot_interval or self._strikes:
            return
        if weights_are_finite(state):
            self.snapshot.take(state)
        else:
            self._reject(state, logger, ["weights"])

    def _flag_outputs(self, state: State) -> None:
        flags = MicrobatchFlags([sample.id for sample in state.batch["samples"]])
        outputs = head_outputs(state.outputs)
        flags.add(outputs)
        flags.add_gradients(outputs)
        self._microbatches.append(flags)

    def _flag_losses(self, state: State) -> None:
        terms: dict[str, Tensor] = state.loss if isinstance(state.loss, dict) else {"total": state.loss}  # pyright: ignore
        self._microbatches[-1].add(terms)
        # A copy: Composer scales the loss in place before the backward pass.
        self._losses.append(terms["total"].detach().to(torch.float64, copy=True))

    def _decide(self, state: State, logger: Logger) -> None:
        reading = self._measure(state)
        logger.log_metrics({f"gradient_norm/{name}": norm for name, norm in self.gradient_norms.items()})
        alarms = self.watch.alarms(reading)
        if alarms and dist.get_global_rank() == 0:
            told = ", ".join(f"{name} ({action.name.lower()})" for name, action in alarms.items())
            log.warning("batch %d, loss %g, gradient norm %g: %s", self._batch, *reading[1:], told)
        worst = max(alarms.values(), default=Action.LOG)
        if reading.is_finite and worst is Action.LOG:
            self._strikes = 0
            self._clip(state)
            return
        reasons = [name for name, action in alarms.items() if action > Action.LOG]
        self._reject(state, logger, reasons, from_data=not reading.is_finite, rollback=worst is Action.ROLLBACK)

    def _measure(self, state: State) -> Reading:
        """This step in numbers of all ranks: the one all-reduce and the one wait for the device."""
        groups = named_groups(state.optimizers[0])
        gradients = [[p.grad for p in group if p.grad is not None] for group in groups.values()]
        sums = square_sums(gradients, self._losses[0].device)
        if not is_sharded(state):
            sums /= dist.get_world_size()  # each rank has the whole sum
        losses = torch.stack(self._losses)
        num_flags = torch.stack([flags.count() for flags in self._microbatches]).sum()
        reduced = torch.cat([sums, torch.stack([losses.sum(), losses.new_tensor(len(losses)), num_flags])])
        dist.all_reduce(reduced)
        *squares, loss, num_losses, flags = reduced.tolist()
        norms = [square**0.5 for square in squares]
        total = sum(squares) ** 0.5
        self.gradient_norms = {**dict(zip(groups, norms, strict=True)), "total": total}
        is_finite = bool(torch.isfinite(reduced).all()) and flags == 0
        return Reading(is_finite, loss / num_losses, total)

    def _clip(self, state: State) -> None:
        """`torch.nn.utils.clip_grad_norm_`, by the norm that is known already."""
        if self.clip_norm is None:
            return
        factor = self.clip_norm * self.clip_scale / (self.gradient_norms["total"] + 1e-6)
        if factor >= 1:
            return
        parameters = [parameter for group in named_groups(state.optimizers[0]).values() for parameter in group]
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        foreach_mul_(gradients, factor)

    def _reject(
        self, state: State, logger: Logger, reasons: list[str], from_data: bool = False, rollback: bool = False
    ) -> None:
        """Makes no step of this batch; restores the snapshot, or stops, where that is not enough."""
        for parameter in state.model.parameters():
            parameter.grad = None  # zeros would still move, decay and count
        self.num_skipped += 1
        self._strikes += 1
        since = self._batch - self.config.skipped_window
        self._recently_skipped = [number for number in self._recently_skipped if number > since] + [self._batch]
        is_sound = weights_are_finite(state)
        rollback = rollback or not is_sound or self._strikes >= self.config.strikes
        stop = ""
        if rollback and self.num_rollbacks >= self.config.max_rollbacks:
            stop = f"a rollback is due after {self.num_rollbacks}, nan_rollback.max_rollbacks"
        elif len(self._recently_skipped) > self.config.max_skipped:
            num_bad, window = len(self._recently_skipped), self.config.skipped_window
            stop = f"{num_bad} of the last {window} batches were bad, above nan_rollback.max_skipped"
        action = "stop" if stop else "rollback" if rollback else "skip"
        self._report(reasons if is_sound else ["weights"], action, blame=from_data and is_sound)
        if stop:
            raise TrainingDiverged(
                f"training diverged at batch {self._batch}: {stop}. The bad batches are listed in "
                f"{self.quarantine.path}: mend the samples named there, or lower the learning rates"
            )
        if rollback:
            self._restore(state)
        logger.log_metrics(
            {
                "nan_rollback/skipped_batches": self.num_skipped,
                "nan_rollback/rollbacks": self.num_rollbacks,
                "nan_rollback/clip_scale": self.clip_scale,
            }
        )

    def _report(self, reasons: list[str], action: str, blame: bool) -> None:
        """Says which samples of which rank were bad; counts them where it was their fault."""
        bad = [(flags.names(), flags.sample_ids) for flags in self._microbatches]
        parts = dist.all_gather_object(bad)
        is_told_apart = any(names for part in parts for names, _ in part)
        entries = []
        for rank, part in enumerate(parts):
            suspects = [(names, ids) for names, ids in part if names or not is_told_apart]
            if not suspects:
                continue
            terms = list(dict.fromkeys(name for names, _ in suspects for name in names))
            ids = list(dict.fromkeys(name for _, names in suspects for name in names))
            terms = [*reasons, *terms] or ["gradient"]
            entries.append(AuditEntry(self._batch, self._epoch, rank, terms, ids, action))
        self.quarantine.write(entries)
        if dist.get_global_rank() == 0:
            for entry in entries:
                told = ", ".join(entry.terms[:4]) + (", ..." if len(entry.terms) > 4 else "")
                log.warning("batch %d: %s, because of %s on rank %d", entry.batch, action, told, entry.rank)
        if blame:
            self.quarantine.blame(name for entry in entries for name in entry.ids)

    def _restore(self, state: State) -> None:
        self.snapshot.restore(state)
        self._strikes = 0
        self.watch.readings.clear()
        self.num_rollbacks += 1
        for scheduler in state.schedulers:
            scheduler.base_lrs = [lr * self.config.lr_factor for lr in scheduler.base_lrs]
        for group in state.optimizers[0].param_groups:
            for name in {"lr", "initial_lr"} & group.keys():
                group[name] *= self.config.lr_factor
        self.clip_scale *= self.config.clip_factor
        log.warning(
            "went back to the weights of batch %d; learning rates x %g, clip norm x %g",
            self.snapshot.batch,
            self.config.lr_factor,
            self.config.clip_factor,
        )


DIVERGED = os.EX_DATAERR  # 65: too many rollbacks; the log and the audit file say of which batches
