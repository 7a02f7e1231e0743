"""Samples that were in bad batches: an audit of each, and no more training on those that come back bad."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from composer.core import State
from composer.utils import dist
from torch.utils.data import DataLoader

from recipe.data.stream import PackStream
from recipe.upstream.torch_private import restart_workers

log = logging.getLogger(__name__)

AUDIT_FILE = "quarantine.jsonl"


@dataclass(frozen=True)
class AuditEntry:
    """One line of the audit file: what one rank had in a bad batch.

    Attributes:
        batch: Number of the batch, from 0.
        epoch: Of the batch.
        rank: Global.
        terms: The loss terms, outputs and gradients that were not finite, or the watchers that went off.
        ids: The samples of the bad microbatches; of the rank's whole batch where nothing told them apart.
        action: skip, rollback or stop.
    """

    batch: int
    epoch: int
    rank: int
    terms: list[str]
    ids: list[str]
    action: str


class Quarantine:
    """Counts how often samples were in a bad batch; from `after` times on they are left out, from the next epoch.

    The same on every rank. An epoch is dealt as it began, so that a resumed one is dealt alike.

    Args:
        folder: Gets the audit file, which is only for people to read: a resumed run goes on from the state.
        after: Times.
    """

    def __init__(self, folder: str | Path, after: int):
        self.path = Path(folder) / AUDIT_FILE
        self.after = after
        self.counts: dict[str, int] = {}
        self.active: list[str] = []

    def write(self, entries: Iterable[AuditEntry]) -> None:
        """Appends to the audit file, on rank 0; a full disk is logged only, as the other ranks go on."""
        if dist.get_global_rank() != 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                for entry in entries:
                    file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
        except OSError as error:
            log.error("the audit of bad batches could not be written: %s. Training goes on: make room", error)

    def blame(self, ids: Iterable[str]) -> None:
        """Counts the samples of one bad batch, each once however often it is named."""
        for name in sorted(set(ids)):
            self.counts[name] = self.counts.get(name, 0) + 1
            if self.counts[name] == self.after:
                log.warning("sample %s is left out from the next epoch on: %d bad batches", name, self.after)

    def begin_epoch(self) -> None:
        """Lets what was counted in the last epoch take effect."""
        self.active = sorted(name for name, count in self.counts.items() if count >= self.after)

    def apply(self, state: State) -> None:
        """Tells the training set which samples to leave out; before its workers start."""
        loader = state.dataloader
        if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, PackStream):
            return
        if self.active and dist.get_global_rank() == 0:
            log.warning("left out of this epoch: %s", ", ".join(self.active))
        if loader.dataset.quarantined != set(self.active):
            loader.dataset.quarantined = set(self.active)
            restart_workers(loader)

    def state_dict(self) -> dict[str, Any]:
        """Counts and the samples left out of this epoch; JSON can hold it."""
        return {"counts": self.counts, "active": self.active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting."""
        self.counts, self.active = dict(state["counts"]), list(state["active"])
