"""Skip batches that would spoil the weights, roll back if they already have, and clip gradients.

One small all-reduce per step gives every rank the same numbers, so all ranks decide alike before the optimizer steps.
"""

import json
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from composer import Algorithm, Event, Logger, State, Time
from composer.utils import dist
from torch import Tensor

from recipe.algorithms.quarantine import AuditEntry, Quarantine
from recipe.algorithms.snapshot import Snapshot, weights_are_finite
from recipe.algorithms.watch import Action, MicrobatchFlags, Reading, Watch, head_outputs
from recipe.config import NaNRollbackConfig
from recipe.optim.groups import local, named_groups, num_copies, square_sums
from recipe.upstream.torch_private import foreach_mul_

log = logging.getLogger(__name__)

DIVERGED = os.EX_DATAERR  # 65, exit status: too many rollbacks; the log and the audit file name the batches

_SAVED = ("clip_scale", "num_skipped", "num_rollbacks", "strikes", "recently_skipped")


class TrainingDiverged(Exception):
    """Stop training that cannot recover; raised on all ranks at once."""


class NaNRollback(Algorithm):
    """Guard the weights against non-finite values and clip the gradient; must be the last algorithm.

    Composer calls the last algorithm first after the backward pass. If a loss term, a head output or a gradient is not
    finite on any rank, the gradients are removed, so the optimizer neither moves, decays nor counts. After `strikes`
    such batches in a row, or if a weight is not finite, the last snapshot is restored, and learning rates and clip
    norm are cut permanently. Time, data and random states are not rolled back.

    Logs `gradient_norm/{group}` and `gradient_norm/total` per step, before clipping; and when it acts
    `nan_rollback/skipped_batches`, `nan_rollback/rollbacks` and `nan_rollback/clip_scale`.

    Args:
        clip_norm: Largest norm of the whole gradient; None: no clipping.
        folder: For the audit file of bad batches.
    """

    def __init__(self, config: NaNRollbackConfig, clip_norm: float | None, folder: str | Path):
        self.config = config
        self.clip_norm = clip_norm
        self.clip_scale = 1.0  # factor on clip_norm, product of all cuts
        self.snapshot_interval = int(Time.from_timestring(config.snapshot_interval))
        self.watch = Watch(config)
        self.quarantine = Quarantine(folder, config.quarantine_after)
        is_on_disk = config.snapshot == "disk"
        self.snapshot = Snapshot(Path(folder, f".snapshot-rank{dist.get_global_rank()}.pt") if is_on_disk else None)
        self.gradient_norms: dict[str, float] = {}  # of the last step: every group and `total`
        self.num_skipped = 0
        self.num_rollbacks = 0
        self.strikes = 0
        self.recently_skipped: list[int] = []
        self._is_saved = False
        self._num_copies = 1  # ranks that hold the same part of the weights
        self._batch, self._epoch = 0, 0
        self._microbatches: list[MicrobatchFlags] = []
        self._losses: list[Tensor] = []

    def match(self, event: Event, state: State) -> bool:
        """Match the events that have a handler."""
        return event in self._HANDLERS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Call the event's handler.

        Raises:
            TrainingDiverged: On all ranks: a bound is reached, or training starts from weights that are not finite.
        """
        self._HANDLERS[event](self, state, logger)

    def state_dict(self) -> dict[str, Any]:
        """Return all that decisions depend on, as one text: a sharded load drops keys that a new run lacks."""
        # A run resumed from this checkpoint starts with its weights as the snapshot, so this run takes one too.
        self._is_saved = True
        state = {name: getattr(self, name) for name in _SAVED}
        state |= {"readings": self.watch.state_dict(), "quarantine": self.quarantine.state_dict()}
        return {**super().state_dict(), "state": json.dumps(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all that decisions depend on."""
        saved = json.loads(state["state"])
        for name in _SAVED:
            setattr(self, name, saved[name])
        self.watch.load_state_dict(saved["readings"])
        self.quarantine.load_state_dict(saved["quarantine"])

    def _begin(self, state: State, logger: Logger) -> None:
        self._num_copies = num_copies(state)  # looks at all modules
        self.quarantine.apply(state)
        if not weights_are_finite(state):
            raise TrainingDiverged(
                f"the weights at the start of training, batch {int(state.timestamp.batch)}, are not finite: "
                "start from an earlier checkpoint"
            )
        self._take(state)
        self._is_saved = False

    def _take(self, state: State) -> None:
        if self.config.snapshot != "off":
            self.snapshot.take(state)

    def _end(self, state: State, logger: Logger) -> None:
        self.snapshot.remove()

    def _begin_epoch(self, state: State, logger: Logger) -> None:
        self.quarantine.begin_epoch()
        self.quarantine.apply(state)

    def _begin_batch(self, state: State, logger: Logger) -> None:
        self._batch, self._epoch = int(state.timestamp.batch), int(state.timestamp.epoch)
        if self._is_saved:
            self._is_saved = False
            if self.snapshot.batch != self._batch and weights_are_finite(state):
                self._take(state)
        if anomaly := self.config.detect_anomaly:
            done = self._batch - int(Time.from_timestring(anomaly.start))
            torch.autograd.set_detect_anomaly(0 <= done < anomaly.batches)

    def _forget_microbatches(self, state: State, logger: Logger) -> None:
        self._microbatches.clear()
        self._losses.clear()

    def _end_batch(self, state: State, logger: Logger) -> None:
        if self.config.detect_anomaly:
            torch.autograd.set_detect_anomaly(False)
        if int(state.timestamp.batch) % self.snapshot_interval or self.strikes:
            return
        if weights_are_finite(state):
            self._take(state)
        else:
            self._reject(state, logger, ["weights"])

    def _flag_outputs(self, state: State, logger: Logger) -> None:
        flags = MicrobatchFlags([sample.id for sample in state.batch["samples"]])
        outputs = head_outputs(state.outputs)
        flags.add(outputs)
        flags.add_gradients(outputs)
        self._microbatches.append(flags)

    def _flag_losses(self, state: State, logger: Logger) -> None:
        terms: dict[str, Tensor] = state.loss if isinstance(state.loss, dict) else {"total": state.loss}  # pyright: ignore
        self._microbatches[-1].add(terms)
        # A copy: Composer scales the loss in place before the backward pass.
        self._losses.append(terms["total"].detach().to(torch.float64, copy=True))

    def _decide(self, state: State, logger: Logger) -> None:
        """Judge this step by numbers reduced over all ranks: the only all-reduce and the only wait for the device."""
        groups = named_groups(state.optimizers[0])
        gradients = [[p.grad for p in group if p.grad is not None] for group in groups.values()]
        sums = square_sums(gradients, self._losses[0].device)
        sums /= self._num_copies
        losses = torch.stack(self._losses)
        num_flags = torch.stack([flags.count() for flags in self._microbatches]).sum()
        reduced = torch.cat([sums, torch.stack([losses.sum(), losses.new_tensor(len(losses)), num_flags])])
        dist.all_reduce(reduced)
        *squares, loss, num_losses, flags = reduced.tolist()
        total = sum(squares) ** 0.5
        reading = Reading(bool(torch.isfinite(reduced).all()) and flags == 0, loss / num_losses, total)
        self.gradient_norms = {name: square**0.5 for name, square in zip(groups, squares, strict=True)}
        self.gradient_norms["total"] = total
        logger.log_metrics({f"gradient_norm/{name}": norm for name, norm in self.gradient_norms.items()})
        alarms = self.watch.alarms(reading)
        if alarms and dist.get_global_rank() == 0:
            names = ", ".join(f"{name} ({action.name.lower()})" for name, action in alarms.items())
            log.warning("batch %d, loss %g, gradient norm %g: %s", self._batch, *reading[1:], names)
        worst = max(alarms.values(), default=Action.LOG)
        if reading.is_finite and worst is Action.LOG:
            self.strikes = 0
            self._clip([gradient for group in gradients for gradient in group], total)
            return
        reasons = [name for name, action in alarms.items() if action > Action.LOG]
        self._reject(state, logger, reasons, from_data=not reading.is_finite, rollback=worst is Action.ROLLBACK)

    def _clip(self, gradients: Sequence[Tensor], norm: float) -> None:
        """Clip like `torch.nn.utils.clip_grad_norm_`, by the norm that is already known."""
        if self.clip_norm is None:
            return
        factor = self.clip_norm * self.clip_scale / (norm + 1e-6)
        if factor < 1:
            foreach_mul_([local(gradient) for gradient in gradients], factor)

    def _reject(
        self, state: State, logger: Logger, reasons: list[str], from_data: bool = False, rollback: bool = False
    ) -> None:
        """Skip this batch; restore the snapshot or stop if that is not enough."""
        for parameter in state.model.parameters():
            parameter.grad = None  # zeros would still move, decay and count
        self.num_skipped += 1
        self.strikes += 1
        window = self.config.skipped_window
        self.recently_skipped = [batch for batch in self.recently_skipped if batch > self._batch - window]
        self.recently_skipped.append(self._batch)
        is_sound = weights_are_finite(state)
        rollback = rollback or not is_sound or self.strikes >= self.config.strikes
        stop = ""
        if rollback and self.num_rollbacks >= self.config.max_rollbacks:
            stop = f"a rollback is due after {self.num_rollbacks}, the limit nan_rollback.max_rollbacks"
        elif rollback and self.config.snapshot == "off":
            stop = "a rollback is due, but nan_rollback.snapshot is off"
        elif len(self.recently_skipped) > self.config.max_skipped:
            stop = f"{len(self.recently_skipped)} of the last {window} batches were bad, above nan_rollback.max_skipped"
        action = "stop" if stop else "rollback" if rollback else "skip"
        self._report(reasons if is_sound else ["weights"], action, blame=from_data and is_sound)
        if stop:
            raise TrainingDiverged(
                f"training diverged at batch {self._batch}: {stop}. The bad batches are listed in "
                f"{self.quarantine.path}: fix the samples named there, or lower the learning rates"
            )
        if rollback:
            self._restore(state)
        metrics = {"skipped_batches": self.num_skipped, "rollbacks": self.num_rollbacks, "clip_scale": self.clip_scale}
        logger.log_metrics({f"nan_rollback/{name}": value for name, value in metrics.items()})

    def _report(self, reasons: list[str], action: str, blame: bool) -> None:
        """Log the bad samples of every rank; count them if `blame`."""
        found = [(flags.names(), flags.sample_ids) for flags in self._microbatches]
        parts = dist.all_gather_object((socket.gethostname(), found))
        is_known = any(names for _, part in parts for names, _ in part)
        entries = []
        for rank, (host, part) in enumerate(parts):
            suspects = [(names, ids) for names, ids in part if names or not is_known]
            if not suspects:
                continue
            terms = list(dict.fromkeys(name for names, _ in suspects for name in names))
            ids = list(dict.fromkeys(name for _, names in suspects for name in names))
            terms = [*reasons, *terms] or ["gradient"]
            entries.append(AuditEntry(self._batch, self._epoch, rank, host, terms, ids, action))
        self.quarantine.write(entries)
        if dist.get_global_rank() == 0:
            for entry in entries:
                terms = ", ".join(entry.terms[:4]) + (", ..." if len(entry.terms) > 4 else "")
                where = (entry.rank, entry.host)
                log.warning("batch %d: %s, because of %s on rank %d of %s", entry.batch, action, terms, *where)
        if blame:
            self.quarantine.blame(name for entry in entries for name in entry.ids)

    def _restore(self, state: State) -> None:
        self.snapshot.restore(state)
        if not weights_are_finite(state):
            raise TrainingDiverged(
                f"weights that are never trained are not finite at batch {self._batch}, and no snapshot holds them: "
                "run the same command again, which reads them from the base model; if it recurs, test the memory"
            )
        self.strikes = 0
        self.watch.readings.clear()
        self.num_rollbacks += 1
        for scheduler in state.schedulers:
            scheduler.base_lrs = [lr * self.config.lr_factor for lr in scheduler.base_lrs]
        for group in state.optimizers[0].param_groups:
            for name in {"lr", "initial_lr"} & group.keys():
                group[name] *= self.config.lr_factor
        self.clip_scale *= self.config.clip_factor
        text = "rolled back to the weights of batch %d; learning rates x %g, clip norm x %g"
        log.warning(text, self.snapshot.batch, self.config.lr_factor, self.config.clip_factor)

    _HANDLERS: ClassVar = {
        Event.FIT_START: _begin,
        Event.EPOCH_START: _begin_epoch,
        Event.BATCH_START: _begin_batch,
        Event.BEFORE_TRAIN_BATCH: _forget_microbatches,
        Event.AFTER_FORWARD: _flag_outputs,
        Event.AFTER_LOSS: _flag_losses,
        Event.AFTER_TRAIN_BATCH: _decide,
        Event.BATCH_END: _end_batch,
        Event.FIT_END: _end,
    }
