"""Packs → what Composer's Trainer takes: a DataSpec whose batches are lists of microbatches."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader

from recipe.config import ConfigError, LoaderConfig
from recipe.data.augment import Augmentation
from recipe.data.collate import Collator, collate_microbatches, collate_packed, collate_standard
from recipe.data.contents import epoch_tokens
from recipe.data.drawn_lengths import DrawnTable, with_draws
from recipe.data.encode import Encoder
from recipe.data.evaluation import EvalSampler, EvalSamples
from recipe.data.kept import none_if_unknown
from recipe.data.lengths import check_records, read_known_lengths, read_length_table
from recipe.data.maker import ExampleMaker
from recipe.data.mapped import shared_arrays
from recipe.data.plan import Budget
from recipe.data.split import read_known_hashes, split_streams
from recipe.data.stream import Packing, PackStream
from recipe.data.teachers import TeacherPool
from recipe.schema import Batch
from recipe.upstream.agreement import LockstepLoader
from recipe.upstream.storage import open_streams

log = logging.getLogger(__name__)

_OF_WORKERS = ("prefetch_factor", "persistent_workers", "multiprocessing_context", "timeout")


def build_train_loader(
    loader: LoaderConfig,
    encoder: Encoder,
    teachers: TeacherPool | None,
    seed: int,
    microbatch_size: int,
    split_batch: Callable[[list[Batch], int | float], Sequence[Batch]],
    val_fraction: float | None = None,
    answers_at_start: bool = True,
    answers_ever: bool = True,
) -> DataSpec:
    """Return the training loader: batches of packs, resumed exactly at any number of ranks and workers.

    A forward pass on one device takes `microbatch_size` packs. Composer calls `split_batch` with each device batch, to
    which it adds the loss denominators of the global batch. `val_fraction` of the images are held out.
    `answers_at_start` and `answers_ever`: whether the first epoch, and any, reads answers;
    `recipe.callbacks.training_data` decides for the others.
    """
    batch_size = device_batch_size(loader)
    streams = open_streams(loader.streams)
    packing, wanted, skips = None, loader.packing, loader.on_bad_sample == "skip"
    split = split_streams(streams, val_fraction)
    is_used = None if split is None else ~split.is_validation
    augmentation, draws = None, None
    if loader.augment is not None:
        augmentation = Augmentation.of(loader.augment, encoder.image_spec, seed)
        draws = partial(with_draws, encoder=encoder, augmentation=augmentation)
    check_records("train_loader", streams, encoder, teachers, loader, answers_ever, is_used, draws)
    if wanted is not None:
        max_tokens = wanted.max_tokens or encoder.max_seq_len
        budget = Budget(max_tokens, wanted.max_patches, wanted.window, encoder.max_seq_len)
        lengths = read_length_table(streams, encoder, teachers)
        lengths = lengths if draws is None else draws(lengths, streams, share=shared_arrays)
        packing = Packing(budget, lengths, skips_long_samples=wanted.on_long_sample == "skip")
    else:
        lengths = stored = read_known_lengths(streams, encoder, teachers)
        if stored is not None and draws is not None:
            lengths = none_if_unknown(lambda: draws(stored, streams, share=shared_arrays))
    if isinstance(lengths, DrawnTable) and dist.get_global_rank() == 0:
        log.info("augmentation: %s (recipe/data/words.py)", lengths.parts.describe())
    dataset = PackStream(
        ExampleMaker(encoder, teachers, seed, augmentation),
        packing,
        skips_bad_samples=skips,
        answers_at_start=answers_at_start,
        answers_ever=answers_ever,
        split=split,
        lengths=lengths,
        image_hashes=read_known_hashes(streams) if split is None else split.images,
        streams=streams,
        batch_size=batch_size,
        **{"shuffle_seed": seed, **loader.dataset},
    )
    dataloader = _dataloader(loader, dataset, encoder.pad_token_id, batch_size, microbatch_size)
    _check_batches("train_loader", loader, dataloader, dataset.plan(0).num_packs)
    return DataSpec(
        dataloader,
        split_batch=split_batch,
        get_num_samples_in_batch=get_num_packs_in_batch,
        get_num_tokens_in_batch=get_num_tokens_in_batch,
    )


def build_eval_loader(
    loader: LoaderConfig,
    encoder: Encoder,
    teachers: TeacherPool | None,
    seed: int,
    val_fraction: float | None = None,
    max_samples: int | None = None,
    where: str = "eval_loader",
) -> DataSpec:
    """Return an evaluation loader: every sample once, in stored order; each batch is one microbatch.

    With `val_fraction`, `loader` is that of `evaluation_loader` and only what training holds out is read. With
    `max_samples`, only the first ones are. `where` is the loader's key, for messages.
    """
    batch_size, skips = device_batch_size(loader), loader.on_bad_sample == "skip"
    streams = open_streams(loader.streams)
    split = split_streams(streams, val_fraction)
    if split is not None and dist.get_global_rank() == 0:
        log.info("validation: %s (val_fraction %s)", split.describe(), val_fraction)
    is_used = None if split is None else split.is_validation
    check_records(where, streams, encoder, teachers, loader, is_used=is_used)
    maker = ExampleMaker(encoder, teachers, seed)
    dataset = EvalSamples(maker, skips, split, max_samples, streams=streams, batch_size=batch_size, **loader.dataset)
    sampler = EvalSampler(dataset)
    dataloader = _dataloader(loader, dataset, encoder.pad_token_id, batch_size, batch_size, sampler=sampler)
    _check_batches(where, loader, dataloader, len(dataset))
    return DataSpec(
        dataloader,
        num_samples=len(dataset),
        split_batch=lambda batches, microbatch_size: batches,
        get_num_samples_in_batch=get_num_samples_in_batch,
        get_num_tokens_in_batch=get_num_tokens_in_batch,
    )


def _check_batches(where: str, loader: LoaderConfig, dataloader: DataLoader, num_packs: int) -> None:
    """Raise ConfigError if an epoch has no batches; log the samples that `drop_last` leaves out of an evaluation."""
    num_batches, size = len(dataloader), loader.global_batch_size
    if num_batches == 0:
        remedy = "check choose, repeat and epoch_size"
        if num_packs:
            remedy = f"set {where}.dataloader.drop_last=false, or lower {where}.global_batch_size"
        raise ConfigError(
            f"{where}: an epoch has no batches, as it has {num_packs} samples or packs for a global_batch_size of "
            f"{size}: {remedy}"
        )
    if where != "train_loader" and num_batches * size < num_packs and dist.get_global_rank() == 0:
        log.warning(
            "eval_loader.dataloader.drop_last leaves out %d of %d samples of %s",
            *(num_packs - num_batches * size, num_packs, where),
        )


def tokens_per_batch(loader: LoaderConfig, spec: DataSpec) -> float:
    """Return the planned tokens of an optimizer step, over all ranks and microbatches: of a mean batch of epoch 0.

    Padding does not count; answers do if that epoch reads them. The same number on every rank, at every resume and at
    any world size. Without packing and records it is an estimate, from some 32 evenly spread samples.
    """
    assert isinstance(spec.dataloader, DataLoader)
    dataset = spec.dataloader.dataset
    assert isinstance(dataset, PackStream)
    plan = dataset.plan(0, dataset.answers_at_start)
    is_packed = loader.packing is not None
    tokens = int(plan.tokens.sum()) if is_packed else epoch_tokens(dataset, 0, dataset.answers_at_start)
    if tokens is not None:
        mean = tokens / plan.num_packs
    else:
        positions = dataset.is_trained.nonzero()[0].tolist()
        positions = positions[:: max(1, len(positions) // 32)]
        mean = sum(len(dataset.example(position).input_ids) for position in positions) / len(positions)
    return mean * loader.global_batch_size


def device_batch_size(loader: LoaderConfig) -> int:
    """Return the packs of a global batch that one rank reads; raise ValueError if the ranks do not divide it."""
    world_size = dist.get_world_size()
    if loader.global_batch_size % world_size:
        raise ValueError(
            f"global_batch_size {loader.global_batch_size} cannot be split over {world_size} ranks: "
            f"make it a multiple of {world_size}"
        )
    return loader.global_batch_size // world_size


def make_collator(name: str, pad_token_id: int) -> Collator:
    """Return the collator `standard` or `packed`; raise ValueError for another name."""
    if name == "standard":
        return partial(collate_standard, pad_token_id=pad_token_id)
    if name == "packed":
        return collate_packed
    raise ValueError(f"collator is {name!r}: write standard or packed")


def get_num_packs_in_batch(batch: list[Batch] | Batch) -> int:
    """Return the packs of a device batch or a microbatch: the unit in which training is counted and resumed."""
    return sum(item["num_packs"] for item in _microbatches(batch))


def get_num_samples_in_batch(batch: list[Batch] | Batch) -> int:
    """Return the samples of a device batch or a microbatch, except inert ones."""
    return sum(item["num_samples"] for item in _microbatches(batch))


def get_num_tokens_in_batch(batch: list[Batch] | Batch) -> dict[str, int]:
    """Return the real tokens, and as `loss_generating` the number of microbatches.

    With `accumulate_train_batch_on_tokens` Composer weights a microbatch by its share of the latter. Equal weights
    leave the division to the global loss denominators.
    """
    microbatches = _microbatches(batch)
    return {"total": sum(item["num_tokens"] for item in microbatches), "loss_generating": len(microbatches)}


def _microbatches(batch: list[Batch] | Batch) -> list[Batch]:
    return batch if isinstance(batch, list) else [batch]


def _dataloader(
    loader: LoaderConfig,
    dataset: PackStream | EvalSamples,
    pad_token_id: int,
    batch_size: int,
    microbatch_size: int,
    **keywords: Any,
) -> DataLoader:
    collate = make_collator(loader.collator, pad_token_id)
    given = {name: value for name, value in loader.dataloader.items() if value is not None}
    if not given.get("num_workers"):  # torch rejects these without workers
        given = {name: value for name, value in given.items() if name not in _OF_WORKERS}
    # The tokenizer's threads do not survive the fork into workers: it would warn in each.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return LockstepLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=partial(collate_microbatches, collate=collate, microbatch_size=microbatch_size),
        worker_init_fn=obey_only_parent,
        generator=torch.Generator(),  # seeds workers, so that an epoch's start or resume leaves training's generator
        **{"pin_memory": torch.cuda.is_available(), **keywords, **given},
    )


def obey_only_parent(worker_id: int) -> None:
    """Make a loader's worker end on its parent's SIGTERM, or soon after its parent has ended, and not on others'.

    Schedulers send SIGTERM to all processes at once. torch's workers would end immediately, and the run with an error
    before it could finish the current batch and save. And a worker that waits for one of another rank, as Streaming's
    do, would outlive a parent that was killed, with its memory.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    started_by = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent() -> None:
        while os.getppid() == started_by:
            received = signal.sigtimedwait({signal.SIGTERM}, 5)
            if received is not None and received.si_pid == parent.pid:
                break
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
