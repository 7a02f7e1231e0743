"""Decide what a run starts from: its own newest valid checkpoint, the one that `load_path` names, or nothing."""

import logging
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import composer.algorithms
import torch
from composer import DataSpec, Event, Trainer
from composer.utils import dist, maybe_create_object_store_from_uri, parse_uri
from composer.utils.file_helpers import extract_path_from_symlink
from torch.serialization import safe_globals
from torch.utils.data import DataLoader

from recipe.callbacks.stoppers import Stopping
from recipe.checkpoints.base import FINGERPRINT
from recipe.checkpoints.check import (
    MANIFEST,
    Found,
    Manifest,
    Origin,
    check,
    differences,
    existing,
    newest_valid,
    read_manifest,
)
from recipe.checkpoints.download import BrokenCheckpoint, on_this_node, own_files, remove_download, scratch_folder
from recipe.checkpoints.places import open_folder
from recipe.checkpoints.save import CheckpointSaver
from recipe.checkpoints.weights import SAFE_GLOBALS, check_file, explaining, is_export, read_weights, some
from recipe.config import NEW_RUN, ConfigError
from recipe.data.stream import PackStream
from recipe.redact import redact
from recipe.upstream.agreement import agree, from_rank_0
from recipe.upstream.trainer_section import TrainerView

log = logging.getLogger(__name__)

HOLDS_BASE = "holds_base"  # whether what `load_path` names also holds weights that the run does not train
WEIGHTS_FROM = "weights_from"  # instead of both: what Composer cannot load, see `recipe.build.take_weights`


def load_keywords(trainer: TrainerView, load_path: str | None, autoresume: bool, origin: Origin) -> dict[str, Any]:
    """Return the Trainer's `load_*` keywords for this run, or `WEIGHTS_FROM`; called by all ranks.

    Its own checkpoints come first: `load_path` is only for a run that has none.

    Raises:
        ValueError: On every rank: there are checkpoints but none can be resumed from, or the one to start from is
            broken or does not fit.
    """
    broken: set[str] = set()

    def look() -> dict[str, Any]:
        found = _own_checkpoint(trainer, autoresume, scratch_folder(trainer.save_folder), broken)
        if found is None:
            return _given(trainer, load_path, origin, trainer.load_weights_only)
        if load_path is not None:
            log.info("load_path %s is ignored: the run has checkpoints of its own", redact(load_path))
        log.info("resuming from %s, batch %d", redact(found.path), found.manifest.batch)
        _check_fit(trainer, origin, found)
        _check_groups(found, origin)
        _check_base(found, origin)
        return {**_keywords(found.path, weights_only=False, manifest=found.manifest), "load_ignore_keys": None}

    while True:
        try:
            return _keywords_from_rank_0(look)
        except BrokenCheckpoint as error:  # as another node found
            if not error.address.startswith(f"{trainer.save_folder}".rstrip("/") + "/"):
                raise
            log.warning("checkpoint %s is skipped: %s", redact(error.address), error.reason)
            broken.add(error.address)


def weights_keywords(trainer: TrainerView, load_path: str | None, origin: Origin) -> dict[str, Any]:
    """Return the Trainer's `load_*` keywords, or `WEIGHTS_FROM`, to load only the weights of `load_path` on all ranks.

    Raises:
        ValueError: On every rank: it is broken, or does not fit.
    """
    return _keywords_from_rank_0(lambda: _given(trainer, load_path, origin, weights_only=True))


def _keywords_from_rank_0(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    found = from_rank_0(look)
    for key in ("load_path", WEIGHTS_FROM):
        if found.get(key) is not None:
            found[key] = on_this_node(found[key])
    error = None
    path = found.get("load_path")
    if path is not None and "://" not in path and not Path(path).exists():
        error = ValueError(f"{path} does not exist on rank {dist.get_global_rank()}: use a folder that all nodes share")
    agree(error)
    return found


def check_data(start: Mapping[str, Any], train_loader: DataSpec) -> None:
    """Raise ConfigError if a run resumes with other data, before its loggers start; called by all ranks.

    `start` is from `load_keywords`. Of a sharded or remote checkpoint the Trainer finds out as it loads it.
    """
    path = start["load_path"]
    if path is None or start["load_weights_only"]:
        return

    def read() -> Mapping[str, Any] | None:
        if not Path(path).is_file():
            return None
        with explaining(Path(path)), safe_globals(SAFE_GLOBALS):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return saved["state"].get("dataset_state", {}).get("train")

    loader = train_loader.dataloader
    assert isinstance(loader, DataLoader) and isinstance(loader.dataset, PackStream)
    if saved := from_rank_0(read):
        loader.dataset.check_plan(saved)


def is_finished(trainer: Trainer) -> bool:
    """Return whether the checkpoint that a run resumed from was its last."""
    assert trainer.state.max_duration is not None
    finished = trainer.state.timestamp >= trainer.state.max_duration
    if any(isinstance(callback, Stopping) and callback.reason for callback in trainer.state.callbacks):
        return True  # it has said so
    if finished:
        log.warning("the run already ended at %s: raise trainer.max_duration to continue", trainer.state.max_duration)
    return finished


def catch_up(trainer: Trainer, saver: CheckpointSaver | None, start: Mapping[str, Any]) -> None:
    """Evaluate the loaded batch if its checkpoint was written before its evaluation; called by all ranks.

    If that evaluation has ended, its scores are in the manifest and count again for the best and for stoppers. `start`
    is from `load_keywords`.
    """
    path = start["load_path"]
    if path is None or start["load_weights_only"]:
        return
    parent, _, name = path.rpartition("/")
    manifest = from_rank_0(lambda: read_manifest(open_folder(parent or "."), name))
    remove_download(path)
    if manifest is None:
        return
    if saver is not None:
        saver.resumed_from(trainer.state, path, manifest)
    if manifest.scores is None:
        log.info("the evaluation of batch %d had not ended: it is repeated now", manifest.batch)
        trainer.engine.run_event(Event.EVAL_BEFORE_ALL)
        trainer.eval()
        trainer.engine.run_event(Event.EVAL_AFTER_ALL)
    elif manifest.scores:
        for callback in trainer.state.callbacks:
            if isinstance(callback, Stopping):
                callback.judge(trainer.state, manifest.scores)


def _given(trainer: TrainerView, load_path: str | None, origin: Origin, weights_only: bool) -> dict[str, Any]:
    if load_path is None:
        return {"load_path": None, HOLDS_BASE: False}
    path = _resolve(load_path)
    parent, _, name = path.rpartition("/")
    place = open_folder(parent or ".")
    manifest = None if path.startswith(("http://", "https://")) else read_manifest(place, name)
    if manifest is not None:
        if reason := check(place, name, manifest, scratch_folder(parent), own_files(path, manifest)):
            raise ValueError(f"load_path {redact(path)} is broken: {reason}: give another checkpoint")
        weights_only = manifest.weights_only or weights_only
        _check_fit(trainer, origin, Found(path, manifest), weights_only)
        holds_base = manifest.origin.base is None
        if weights_only and not (holds_base and manifest.sharded == trainer.saves_shards):
            return {"load_path": None, WEIGHTS_FROM: path}
        if not weights_only:
            _check_groups(Found(path, manifest), origin)
            _check_base(Found(path, manifest), origin)
        return _keywords(path, weights_only, manifest)
    if is_export(path):
        log.info("load_path %s is an export, which holds weights only", path)
        return {"load_path": None, WEIGHTS_FROM: path}
    if "://" not in path and Path(path).is_dir():
        raise ValueError(
            f"load_path {redact(path)} is a folder without {MANIFEST}, so not a run's checkpoint, and not an export: "
            "give a checkpoint in it; a Hugging Face model belongs in model.pretrained_model_name_or_path"
        )
    log.warning("%s has no manifest, as one of this recipe would: only its weights are loaded", redact(path))
    if Path(path).is_file() and FINGERPRINT in read_weights(path):  # it was, but its manifest was left behind
        return {"load_path": None, WEIGHTS_FROM: path}
    return _keywords(path, weights_only=True)


def _keywords(path: str, weights_only: bool, manifest: Manifest | None = None) -> dict[str, Any]:
    return {
        "load_path": path,
        "load_weights_only": weights_only,
        "load_exclude_algorithms": list(EXCLUDED_ALGORITHMS),
        HOLDS_BASE: manifest is None or manifest.origin.base is None,
    }


def _own_checkpoint(
    trainer: TrainerView, autoresume: bool, scratch: Path | None, broken: Container[str]
) -> Found | None:
    folder = trainer.save_folder
    if folder is None:
        return None
    found = newest_valid(folder, scratch, partial(own_files, folder), broken) if autoresume else None
    if found is not None or (trainer.save_overwrite and not autoresume) or not (names := existing(folder)):
        return found
    if autoresume:
        raise ValueError(
            f"{redact(folder)} holds checkpoints but none to resume from ({some(names)}): see the warnings above; "
            "set another run_folder, or start over with autoresume=false trainer.save_overwrite=true"
        )
    raise ValueError(
        f"{redact(folder)} holds checkpoints ({some(names)}) and autoresume is false: set autoresume=true to resume, "
        "trainer.save_overwrite=true to start over, or another run_folder"
    )


def _resolve(path: str) -> str:
    """Return the checkpoint that a link such as `latest-rank0.pt` names, with 0 for `{rank}`."""
    path = path.replace("{rank}", "0")
    store = maybe_create_object_store_from_uri(path)
    if store is not None:
        if not path.endswith(".symlink"):
            return path
        backend, bucket, _ = parse_uri(path)
        return f"{backend}://{bucket}/{extract_path_from_symlink(path, store)}"
    return path if path.startswith(("http://", "https://")) else str(Path(path).resolve())


def _check_groups(found: Found, origin: Origin) -> None:
    """Raise ValueError if the optimizer's state is of other groups: a rate became 0, or is 0 no longer; or 8-bit."""
    then, now = found.manifest.origin.config.get("optimizer", {}), origin.config.get("optimizer", {})
    kinds = [settings.get("moments", "full") for settings in (then, now)]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            f"optimizer.moments is {kinds[1]}, but {redact(found.path)} was saved with {kinds[0]}: set "
            f"optimizer.moments={kinds[0]}; or start a new run from the weights: {NEW_RUN}"
        )
    adapted = origin.config.get("lora") or {}
    for key in sorted(now):
        if key.startswith("lr_lora_") and not adapted.get(key.removeprefix("lr_lora_")):
            continue  # there is no such group; if the checkpoint has it, its model is another
        if key.startswith("lr_") and isinstance(now[key], int | float) and (now[key] == 0) != (then.get(key) == 0):
            name, was = key.removeprefix("lr_"), "frozen" if then.get(key) == 0 else "trained"
            stages = f"; staged_freezing.groups.{name} freezes it from some batch on" if was == "trained" else ""
            raise ConfigError(
                f"optimizer.{key} is {now[key]:g}, but {redact(found.path)} was saved with the group {was} "
                f"({then.get(key)}): set optimizer.{key}={then.get(key)}{stages}; "
                f"or start a new run from the weights: {NEW_RUN}"
            )


def _check_base(found: Found, origin: Origin) -> None:
    """Raise ValueError if a checkpoint lacks the weights of another base model than the run's."""
    if origin.base and found.manifest.origin.base not in (None, origin.base):
        raise ValueError(
            f"{redact(found.path)} holds only what its run trained, on top of another base model: set "
            "model.pretrained_model_name_or_path to the one of that run, or set another run_folder"
        )


def _check_fit(trainer: TrainerView, origin: Origin, found: Found, weights_only: bool = False) -> None:
    """Log how the configuration differs from the checkpoint's.

    Raises:
        ValueError: Model, tokenizer, layout or the presence of averages differ.
    """
    manifest, path = found.manifest, redact(found.path)
    saved_ema, ema = manifest.origin.config.get("ema"), origin.config.get("ema")
    if saved_ema is not None and ema is None:
        raise ValueError(f"{path} has averages of the head's weights and this run keeps none: set ema to {saved_ema}")
    if saved_ema is None and ema is not None and not weights_only:
        raise ValueError(
            f"{path} has no averages of the head's weights, which this run keeps: set ema=null, "
            f"or start a new run from the weights, which are its first averages: {NEW_RUN}"
        )
    changed = differences(manifest.origin.config, origin.config)
    for change in changed:
        log.info("the configuration differs from that of %s in %s", PurePosixPath(path).name, change)
    for what in ("tokenizer", "model"):
        if getattr(origin, what) != getattr(manifest.origin, what):
            shape = " in names or shapes of its parameters" if what == "model" else ""
            raise ValueError(
                f"{path} was made with another {what}{shape}; the configurations differ in "
                f"{some(changed) or 'nothing'}: give the {what} it was trained with, or set another run_folder"
            )
    if manifest.sharded != trainer.saves_shards:
        kind, remedy = ("sharded", "sharded") if manifest.sharded else ("whole", "full, or leave fsdp out")
        if not weights_only:
            raise ValueError(
                f"{path} is a {kind} checkpoint and this run reads the other kind: set "
                f"trainer.parallelism_config.fsdp.state_dict_type: {remedy}, or start a new run from the weights: "
                f"{NEW_RUN}"
            )
        if "://" in path:
            raise ValueError(f"{path} is a {kind} checkpoint: copy it to a disk, and give load_path its place there")


# Composer would build the algorithms that a checkpoint names by evaluating its text; exclude all it can name.
EXCLUDED_ALGORITHMS: Sequence[str] = dir(composer.algorithms)


@contextmanager
def safe_loading() -> Iterator[None]:
    """Make Composer and torch check files with `check_file` and read plain data only, whatever the environment says."""
    switches = {
        "CHECKPOINT_VALIDATION_FUNCTION": f"{check_file.__module__}.check_file",
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0",
    }
    before = dict(os.environ)
    os.environ.update(switches)
    try:
        with safe_globals(SAFE_GLOBALS):
            yield
    finally:
        for name in switches:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
