"""Save checkpoints that are whole or recognizably not, keep the best one, and survive a full disk."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import Any

from composer import callbacks
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import checkpoint, create_symlink_file, dist, format_name_with_dist, parse_uri

from recipe.algorithms.snapshot import weights_are_finite
from recipe.checkpoints.check import (
    REPLACED,
    UNFINISHED,
    FileEntry,
    Manifest,
    Origin,
    best_metric,
    clean,
    manifest_of,
    prune,
    write_manifest,
)
from recipe.checkpoints.places import LocalFolder, StoreFolder, open_folder
from recipe.checkpoints.upload import Uploads, failed_uploads
from recipe.checkpoints.write import (
    WriteError,
    link,
    num_bytes,
    state_of_training,
    together,
    write_file,
    write_shards,
)
from recipe.config import SaveBestConfig
from recipe.metrics.gather import UNDEFINED
from recipe.optim.groups import num_copies
from recipe.records import replacing
from recipe.redact import redact
from recipe.upstream.flags import flags_without_process
from recipe.upstream.local_copies import LocalCopies
from recipe.upstream.trainer_section import TrainerView

log = logging.getLogger(__name__)

BEST_FILE, BEST_FOLDER = "best-rank0.pt", "best"
# Keywords of the Trainer, and the saver's own.
KEYWORDS: Mapping[str, str] = {
    "save_folder": "folder",
    "save_filename": "filename",
    "save_latest_filename": "latest_filename",
    "save_interval": "save_interval",
    "save_overwrite": "overwrite",
    "save_num_checkpoints_to_keep": "num_checkpoints_to_keep",
    "save_weights_only": "weights_only",
    "save_ignore_keys": "ignore_keys",
}


def without_saving(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Trainer's keywords without those that the saver takes."""
    return {name: value for name, value in trainer.items() if name not in KEYWORDS}


def build_saver(trainer: TrainerView, best: SaveBestConfig, origin: Origin) -> "CheckpointSaver | None":
    """Return the saver for the `trainer.save_*` keywords; None if `save_folder` is null."""
    if trainer.save_folder is None:
        return None
    keywords = {KEYWORDS[name]: value for name, value in trainer.keywords.items() if name in KEYWORDS}
    # The folder was checked before the run began: what is overwritten is broken, or is meant to be overwritten.
    keywords |= {"folder": trainer.save_folder, "overwrite": True}
    return CheckpointSaver(origin, best.metric, best.mode, **keywords)


@dataclass(frozen=True)
class _Saved:
    """Hold a checkpoint on disk and the names of the files that this rank wrote."""

    target: Path
    manifest: Manifest
    own: list[str]

    @property
    def folder(self) -> Path:
        return self.target if self.manifest.sharded else self.target.parent


class CheckpointSaver(callbacks.CheckpointSaver):
    """Add to Composer's saver, its names and uploads, checkpoints that can be trusted.

    A file is written under another name, flushed and renamed; a sharded folder is whole once it has its manifest, the
    last file. If a checkpoint cannot be written or its weights are not finite, an error is logged and training
    continues. It ends with an error only if its last checkpoint could not be written.

    Args:
        metric: Keep the checkpoint of the best evaluation by this metric, such as `eval/box_ap50`.
        mode: Whether the greatest (`max`) or the least (`min`) value is the best.
    """

    def __init__(self, origin: Origin, metric: str | None = None, mode: str = "max", **keywords: Any):
        self._copies = LocalCopies() if "://" in str(keywords["folder"]) else None
        with nullcontext() if self._copies is None else self._copies.holding(), flags_without_process():
            super().__init__(**keywords)
        self._uploads: Uploads | None = None
        self._is_ending = False  # no later checkpoint would make up for one that is left out
        if self.remote_uploader is not None:
            self._uploads = Uploads(StoreFolder(str(keywords["folder"])), self.upload_timeout_in_seconds)
            self.remote_uploader.upload_executor = self._uploads  # pyright: ignore[reportAttributeAccessIssue]
        self.origin = origin
        self.metric = metric
        self.mode = mode
        self.best: float | None = None
        self.failure: str | None = None
        self._given_folder = str(keywords["folder"])
        self._last: _Saved | None = None
        self._write_config: Callable[[], None] | None = None

    def resumed_from(self, state: State, path: str, manifest: Manifest) -> None:
        """Take over what an own checkpoint on disk, which the state was loaded from, holds; called by all ranks."""
        if self.remote_uploader is None and Path(path).is_relative_to(self._local_folder(state)):
            self._last = _Saved(Path(path), manifest, list(manifest.files) if dist.get_global_rank() == 0 else [])
            self.last_checkpoint_batch = state.timestamp.batch
        value = (manifest.scores or {}).get((self.metric or "").removeprefix("eval/"))
        if value is not None:
            self._improves(value)

    def keep_config(self, write: Callable[[], None]) -> None:
        """Write the run's configuration, which belongs to the weights: if they are of an earlier run, with the next."""
        if self._last is None:
            write()
        else:
            self._write_config = write

    def fit_start(self, state: State, logger: Logger) -> None:
        """Remove what a killed process left half written."""
        places = [LocalFolder(self._local_folder(state)), *([] if self._uploads is None else [self._uploads.place])]
        for place in places if dist.get_global_rank() == 0 else ():
            try:
                clean(place, state.timestamp.batch.value)
            except (OSError, NotImplementedError) as error:  # they are never mistaken for whole ones
                log.warning("what a killed run left in %s stays there: %s", redact(self._given_folder), error)
        super().fit_start(state, logger)
        if self.metric is not None:
            name = BEST_FOLDER if state.fsdp_sharded_state_dict_enabled else BEST_FILE
            is_first = dist.get_global_rank() == 0
            kept = together(lambda: best_metric(open_folder(self._given_folder), name) if is_first else None)
            if self.metric not in (dist.all_gather_object(kept)[0] or {}):
                self.best = None  # it belongs to another metric, or to another run that this one started from

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Write the checkpoint that is due, so that an evaluation that fails loses no training."""
        is_epoch_end = int(state.timestamp.batch_in_epoch) == 0
        event = Event.EPOCH_CHECKPOINT if is_epoch_end else Event.BATCH_CHECKPOINT
        if self.last_checkpoint_batch != state.timestamp.batch and self.save_interval(state, event):
            self._save_checkpoint(state, logger, is_evaluated=False)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Keep the checkpoint of the best evaluation; the state is that of the batch just finished."""
        scores = {name: float(value) for name, value in state.eval_metric_values.items()}
        scores = dist.all_gather_object(scores)[0]
        last = self._last
        if last is not None and last.manifest.batch != state.timestamp.batch.value:
            last = None
        if self.metric is not None:
            name = self.metric.removeprefix("eval/")
            if name not in scores:
                known = ", ".join(f"eval/{known}" for known in scores)
                raise ValueError(f"save_best.metric {self.metric} is measured by no evaluation: choose one of {known}")
            if self._improves(scores[name]):
                if self.last_checkpoint_batch != state.timestamp.batch:
                    self._save_checkpoint(state, logger, is_best=True)
                elif last is not None:
                    self._attempt(state, lambda: self._keep_best(state, logger, last, scores))
        if last is not None and last.manifest.scores is None:
            self._attempt(state, lambda: self._add_scores(state, logger, last, scores))

    def _improves(self, value: float) -> bool:
        """Return whether a value is the best so far, and remember it."""
        better = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        if isnan(value) or value == UNDEFINED or not better:
            return False
        self.best = value
        return True

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log failed uploads, for which Composer's own saver would end this rank."""
        for problem in failed_uploads(self.remote_uploader, wait=False):
            log.error("an upload to %s failed: %s. Training continues", redact(self._given_folder), problem)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait for uploads; raise RuntimeError if the last checkpoint could not be written."""
        self._await_uploads(state)
        if self.failure is not None:
            raise RuntimeError(
                f"training has ended, but its last checkpoint could not be written: {self.failure}. Free space in "
                f"{self._given_folder}, then run the same command again: it resumes from the newest checkpoint there"
            )

    def finish_uploads(self) -> None:
        """Wait for the uploads of this rank, of a training that ends with an exception."""
        if self._uploads is not None:
            self._uploads.finish()

    def post_close(self) -> None:
        """Wait for uploads; then remove the local copies of what is in a store."""
        super().post_close()
        if self._copies is not None:
            self._copies.remove()

    def save_now(self, state: State, logger: Logger) -> None:
        """Save the batch just finished if it has no checkpoint, and wait for uploads; raise RuntimeError on failure."""
        self._is_ending = True
        if self.last_checkpoint_batch != state.timestamp.batch:
            self._save_checkpoint(state, logger)
        self._await_uploads(state)
        if self.failure is not None:
            raise RuntimeError(f"no checkpoint of batch {state.timestamp.batch.value} could be written: {self.failure}")

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far, and of what."""
        return {"best": self.best, "metric": self.metric, "mode": self.mode}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best value so far, if it is of the same metric."""
        is_same = (state.get("metric", self.metric), state.get("mode", self.mode)) == (self.metric, self.mode)
        self.best = state.get("best") if is_same and state.get("best") != UNDEFINED else None

    def _save_checkpoint(self, state: State, logger: Logger, is_best: bool = False, is_evaluated: bool = True) -> None:
        self.last_checkpoint_batch = state.timestamp.batch
        if weights_are_finite(state):
            self.failure = self._attempt(state, lambda: self._save(state, logger, is_best, is_evaluated))
            return
        # A run could not continue from it, nor would it look for older ones.
        self.failure = "its weights are not finite"
        if dist.get_global_rank() == 0:
            log.error("no checkpoint of batch %d is written: %s", state.timestamp.batch.value, self.failure)

    def _await_uploads(self, state: State) -> None:
        def wait() -> None:
            if problems := failed_uploads(self.remote_uploader, wait=True):
                raise OSError("; ".join(problems))

        self.failure = self._attempt(state, lambda: together(wait)) or self.failure

    def _attempt(self, state: State, action: Callable[[], None]) -> str | None:
        """Return why an action failed, on every rank; None if it did not."""
        try:
            action()
        except WriteError as error:
            if dist.get_global_rank() == 0:
                text = "no checkpoint of batch %d could be written in %s: %s. Training continues; free disk space"
                log.error(text, state.timestamp.batch.value, self._given_folder, error)
            return str(error)
        return None

    def _save(self, state: State, logger: Logger, is_best: bool, is_evaluated: bool) -> None:
        sharded = state.fsdp_sharded_state_dict_enabled
        own_file = Path(checkpoint.get_save_filename(state, self.filename.format(state, keep_placeholders=True)))
        target = own_file.parent if sharded else own_file
        content = state_of_training(state, self.weights_only, self.ignore_keys)
        # Only one of the ranks that hold the same part of the weights writes it.
        num_writers = dist.get_world_size() // num_copies(state)
        together(lambda: self._prepare(state, logger, target, content, sharded, num_writers))
        written = together(lambda: self._write(content, target, state))
        files = {name: entry for part in dist.all_gather_object(written) for name, entry in part.items()}
        manifest = Manifest(
            files=files,
            timestamp={name: int(getattr(state.timestamp, name)) for name in ("epoch", "batch", "sample", "token")},
            origin=self.origin,
            world_size=dist.get_world_size(),
            sharded=sharded,
            weights_only=self.weights_only,
            metric={},
            scores={} if is_evaluated else None,
        )
        self._last = last = _Saved(target, manifest, list(written))
        if is_best and self.metric is not None and (best := self.best) is not None:
            # Before the checkpoint is whole: a run resumed from it is past the evaluation and does not repeat it.
            scores = {self.metric.removeprefix("eval/"): best}
            self._attempt(state, lambda: self._keep_best(state, logger, last, scores))
        together(lambda: self._publish(state, logger, last))
        together(lambda: self._point_latest(state, logger, target))
        if written:
            self.saved_checkpoints.append(str(own_file))
        if self.num_checkpoints_to_keep >= 0:
            together(lambda: self._rotate(state))

    def _prepare(
        self,
        state: State,
        logger: Logger,
        target: Path,
        content: Mapping[str, Any],
        sharded: bool,
        num_writers: int,
    ) -> None:
        """Check for space and remove an older checkpoint of this name: it is broken, or to be overwritten."""
        if self._uploads is not None:
            assert state.max_duration is not None
            self._uploads.make_room(self._is_ending or state.timestamp >= state.max_duration)
        rank = dist.get_global_rank()
        is_remote = self.remote_uploader is not None
        if rank == 0 or is_remote:
            target.parent.mkdir(parents=True, exist_ok=True)
        if sharded and is_remote:
            num_writers = min(num_writers, dist.get_local_world_size())
        elif not sharded:
            num_writers = int(rank == 0)
        if num_writers:
            copies = 2 if is_remote else 1  # the uploader stages a copy
            needed, free = num_bytes(content) * num_writers * copies, shutil.disk_usage(target.parent).free
            if free < needed:
                raise OSError(f"{target.parent} has {free} bytes free, the checkpoint needs {needed}")
        if rank == 0:
            self._begin(state, logger, target, sharded)
        if sharded and target.exists() and (rank == 0 or is_remote):
            shutil.rmtree(target)

    def _begin(self, state: State, logger: Logger, target: Path, sharded: bool) -> None:
        """Mark a checkpoint as unfinished, on the disk and in the store."""
        marker, manifest = Path(f"{target}{UNFINISHED}"), manifest_of(str(target), sharded)
        marker.touch()
        for path in (manifest, manifest + REPLACED):
            Path(path).unlink(missing_ok=True)
        if self.remote_uploader is not None:
            self._upload_checkpoint(self._remote_name(state, marker), str(marker), [], logger)

    def _write(self, content: dict[str, Any], target: Path, state: State) -> dict[str, FileEntry]:
        if state.fsdp_sharded_state_dict_enabled:
            assert state.fsdp_config is not None
            return write_shards(content, target, state.fsdp_config.save_planner)
        return write_file(content, target) if dist.get_global_rank() == 0 else {}

    def _publish(self, state: State, logger: Logger, saved: _Saved) -> None:
        """Write the manifest and upload all, the manifest last."""
        paths = [saved.folder / name for name in saved.own]
        if dist.get_global_rank() == 0:
            for name in saved.manifest.files if self.remote_uploader is None else ():
                if not (saved.folder / name).is_file():
                    raise OSError(f"{name} of another rank is not in {saved.folder}: all nodes must share the folder")
            path = Path(manifest_of(str(saved.target), saved.manifest.sharded))
            if self._write_config is not None:
                self._write_config()
                self._write_config = None
            write_manifest(saved.manifest, path)
            Path(f"{saved.target}{UNFINISHED}").unlink()
            paths.append(path)
        for path in paths:
            self._upload_checkpoint(self._remote_name(state, path), str(path), [], logger)

    def _point_latest(self, state: State, logger: Logger, target: Path) -> None:
        """Replace the link to the latest checkpoint, at no time leaving none."""
        if dist.get_global_rank() > 0 or self.latest_filename is None or self.num_checkpoints_to_keep == 0:
            return
        link = Path(self.latest_filename.format(state))
        link.parent.mkdir(parents=True, exist_ok=True)
        with replacing(link) as new:
            new.symlink_to(os.path.relpath(target, link.parent))
        self.symlink_count += 1
        symlink = Path(self.tmp_dir_for_symlink.name, f"latest.{self.symlink_count}.symlink")
        create_symlink_file(self._remote_name(state, target), str(symlink))
        self._upload_checkpoint(f"{self._remote_name(state, link)}.symlink", str(symlink), [], logger)

    def _keep_best(self, state: State, logger: Logger, last: _Saved, scores: dict[str, float]) -> None:
        """Give the checkpoint a second name, which rotation ignores, with the metric in its manifest."""
        assert self.metric is not None
        sharded = last.manifest.sharded
        target = self._local_folder(state) / (BEST_FOLDER if sharded else BEST_FILE)
        renamed = {name: name if sharded else target.name for name in last.manifest.files}
        files = {renamed[name]: entry for name, entry in last.manifest.files.items()}
        value = scores[self.metric.removeprefix("eval/")]
        measured = scores if last.manifest.scores is None else last.manifest.scores
        manifest = replace(last.manifest, files=files, metric={self.metric: value}, scores=measured)
        best = _Saved(target, manifest, [renamed[name] for name in last.own])

        def rename_all() -> None:
            if dist.get_global_rank() == 0:
                self._begin(state, logger, target, sharded)
            best.folder.mkdir(parents=True, exist_ok=True)
            for name in last.own:
                link(last.folder / name, best.folder / renamed[name])

        together(rename_all)
        together(lambda: self._publish(state, logger, best))
        if dist.get_global_rank() == 0:
            log.info("best checkpoint so far: batch %d, %s %g", manifest.batch, self.metric, value)

    def _add_scores(self, state: State, logger: Logger, last: _Saved, scores: dict[str, float]) -> None:
        """Add to a checkpoint's manifest what its batch's evaluation measured, so that no resume repeats it."""
        self._last = replace(last, manifest=replace(last.manifest, scores=scores))

        def rewrite() -> None:
            if dist.get_global_rank() == 0:
                path = Path(manifest_of(str(last.target), last.manifest.sharded))
                write_manifest(replace(last.manifest, scores=scores), path)
                self._upload_checkpoint(self._remote_name(state, path), str(path), [], logger)

        together(rewrite)

    def _rotate(self, state: State) -> None:
        """Remove the oldest checkpoints, also of earlier launches, down to `num_checkpoints_to_keep`.

        With a store, that number is kept there, and one on each rank's disk.
        """
        if dist.get_global_rank() > 0:
            while self.remote_uploader is not None and len(self.saved_checkpoints) > 1:
                shutil.rmtree(Path(self.saved_checkpoints.pop(0)).parent)
            return
        batch, keep = state.timestamp.batch.value, self.num_checkpoints_to_keep
        local = LocalFolder(self._local_folder(state))
        if self.remote_uploader is None or self._uploads is None:
            prune(local, keep, batch)
        else:
            prune(local, 1, batch)  # `_keep_best` needs the last
            self.remote_uploader.futures.append(self._uploads.prune(keep, batch))

    def _local_folder(self, state: State) -> Path:
        return Path(format_name_with_dist(self.folder, state.run_name))

    def _remote_name(self, state: State, path: Path) -> str:
        prefix = format_name_with_dist(parse_uri(self._given_folder)[2], state.run_name)
        return f"{prefix}/{path.relative_to(self._local_folder(state)).as_posix()}".lstrip("/")
