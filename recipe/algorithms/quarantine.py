"""Record the samples of bad batches and exclude those that are bad repeatedly."""

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
    """Hold one line of the audit file: what one rank had in a bad batch."""

    batch: int  # from 0
    epoch: int
    rank: int  # global
    host: str  # name of the rank's machine
    terms: list[str]  # loss terms, outputs and gradients that were not finite, or watchers that triggered
    ids: list[str]  # samples of the bad microbatches, or of the rank's whole batch if none can be singled out
    action: str  # skip, rollback or stop


class Quarantine:
    """Count how often each sample was in a bad batch; exclude it from the epoch after the `after`-th time.

    The counts are the same on every rank. The exclusions of an epoch never change within it, so it resumes alike.
    """

    def __init__(self, folder: str | Path, after: int):
        self.path = Path(folder) / AUDIT_FILE  # only for people to read: a resumed run restores its counts from state
        self.after = after
        self.counts: dict[str, int] = {}
        self.active: list[str] = []

    def write(self, entries: Iterable[AuditEntry]) -> None:
        """Append to the audit file on rank 0; a full disk is only logged, since the other ranks continue."""
        if dist.get_global_rank() != 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries)
        except OSError as error:
            log.error("the audit of bad batches could not be written: %s. Training continues: free disk space", error)

    def blame(self, ids: Iterable[str]) -> None:
        """Count each sample of one bad batch once."""
        for name in sorted(set(ids)):
            self.counts[name] = self.counts.get(name, 0) + 1
            if self.counts[name] == self.after:
                log.warning("sample %s was in %d bad batches: excluded from the next epoch", name, self.after)

    def begin_epoch(self) -> None:
        """Activate what was counted until now."""
        self.active = sorted(name for name, count in self.counts.items() if count >= self.after)

    def apply(self, state: State) -> None:
        """Pass the active exclusions to the training set before its workers start."""
        loader = state.dataloader
        if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, PackStream):
            return
        if self.active and dist.get_global_rank() == 0:
            log.warning("excluded from this epoch: %s", ", ".join(self.active))
        if loader.dataset.quarantined != set(self.active):
            loader.dataset.quarantined = set(self.active)
            restart_workers(loader)

    def state_dict(self) -> dict[str, Any]:
        """Return counts and active exclusions, as JSON can hold them."""
        return {"counts": self.counts, "active": self.active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore counts and active exclusions."""
        self.counts, self.active = dict(state["counts"]), list(state["active"])
