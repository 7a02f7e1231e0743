"""Examples → what Composer's Trainer takes: a DataSpec whose batches are lists of collated microbatches.

The examples of a device batch are cut into microbatches in the worker, before they are collated: so a microbatch is
padded to its own longest row, and nobody has to slice images apart again.
"""

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
from streaming import Stream
from torch.utils.data import DataLoader

from recipe.config import LoaderConfig, PackingConfig
from recipe.data.collate import collate_packed, collate_standard
from recipe.data.encode import Encoder
from recipe.data.lengths import read_length_table
from recipe.data.plan import Budget
from recipe.data.stream import EvalSampler, EvalSamples, ExampleMaker, Packing, PackStream
from recipe.data.teachers import TeacherPool
from recipe.schema import Batch, Example, LossCounts, Pack, Role
from recipe.upstream.agreement import LockstepLoader
from recipe.upstream.storage import open_streams

_OF_WORKERS = ("prefetch_factor", "persistent_workers", "multiprocessing_context", "timeout")

Collator = Callable[[Sequence[Example]], Batch]


def build_train_loader(
    loader: LoaderConfig,
    encoder: Encoder,
    teachers: TeacherPool | None,
    seed: int,
    microbatch_size: int,
    equally_many: bool = False,
) -> DataSpec:
    """Return the training loader: batches of packs, resumed exactly at any number of ranks and workers.

    Args:
        loader: The section `train_loader`.
        encoder: Sample → Example.
        teachers: From `read_teachers`; None: no sample is shown any.
        seed: Of shuffling, teachers and noise.
        microbatch_size: Packs of one forward pass on one device.
        equally_many: Every rank must have as many microbatches, as FSDP needs.

    Raises:
        ValueError: The shards are missing, a sample is too long, or the ranks do not divide the batch.
    """
    batch_size = device_batch_size(loader)
    streams = open_streams(loader.streams)
    dataset = PackStream(
        ExampleMaker(encoder, teachers, seed),
        _build_packing(loader.packing, encoder, teachers, streams),
        skips_bad_samples=loader.on_bad_sample == "skip",
        streams=streams,
        batch_size=batch_size,
        **{"shuffle_seed": seed, **loader.dataset},
    )
    collate = make_collator(loader.collator, encoder.pad_token_id)
    return DataSpec(
        _dataloader(
            loader, dataset, batch_size, partial(collate_packs, collate=collate, microbatch_size=microbatch_size)
        ),
        split_batch=partial(split_batch, equally_many=equally_many),
        get_num_samples_in_batch=get_num_packs_in_batch,
        get_num_tokens_in_batch=get_num_tokens_in_batch,
    )


def build_eval_loader(loader: LoaderConfig, encoder: Encoder, teachers: TeacherPool | None, seed: int) -> DataSpec:
    """Return the evaluation loader: every sample once, in stored order; one microbatch per batch, counted alone.

    Args:
        loader: The section `eval_loader`.
        encoder: Sample → Example.
        teachers: From `read_teachers`; None: no sample is shown any.
        seed: Of teachers and noise.

    Raises:
        ValueError: The shards are missing, or the ranks do not divide the batch.
    """
    batch_size = device_batch_size(loader)
    dataset = EvalSamples(
        ExampleMaker(encoder, teachers, seed),
        streams=open_streams(loader.streams),
        batch_size=batch_size,
        **loader.dataset,
    )
    collate = make_collator(loader.collator, encoder.pad_token_id)
    return DataSpec(
        _dataloader(
            loader,
            dataset,
            batch_size,
            partial(collate_microbatches, collate=collate, microbatch_size=batch_size),
            sampler=EvalSampler(dataset),
        ),
        num_samples=len(dataset),
        split_batch=lambda batches, microbatch_size: batches,
        get_num_samples_in_batch=get_num_samples_in_batch,
        get_num_tokens_in_batch=get_num_tokens_in_batch,
    )


def tokens_per_batch(loader: LoaderConfig, spec: DataSpec, num_samples: int = 32) -> float:
    """Return the real tokens of one global batch: the first epoch's mean pack, or the mean of evenly spread samples.

    The same number on every rank and at every resume.
    """
    assert isinstance(spec.dataloader, DataLoader)
    dataset = spec.dataloader.dataset
    assert isinstance(dataset, PackStream)
    plan = dataset.plan(0)
    if loader.packing is not None:
        mean = float(plan.tokens.sum()) / plan.num_packs
    else:
        positions = range(0, dataset.num_samples, max(1, dataset.num_samples // num_samples))
        mean = sum(len(dataset.example(position).input_ids) for position in positions) / len(positions)
    return mean * loader.global_batch_size


def device_batch_size(loader: LoaderConfig) -> int:
    """Packs (samples, where they are not packed) of a global batch that one rank reads.

    Raises:
        ValueError: The ranks do not divide the batch.
    """
    world_size = dist.get_world_size()
    if loader.global_batch_size < 1 or loader.global_batch_size % world_size:
        raise ValueError(
            f"global_batch_size {loader.global_batch_size} cannot be shared out over {world_size} ranks: "
            f"make it a multiple of {world_size}"
        )
    return loader.global_batch_size // world_size


def make_collator(name: str, pad_token_id: int) -> Collator:
    """`standard` or `packed`, as a function of the examples alone.

    Raises:
        ValueError: Another name.
    """
    if name == "standard":
        return partial(collate_standard, pad_token_id=pad_token_id)
    if name == "packed":
        return collate_packed
    raise ValueError(f"collator is {name!r}: write standard or packed")


def collate_microbatches(examples: Sequence[Example], collate: Collator, microbatch_size: int) -> list[Batch]:
    """Cuts the examples of a device batch into microbatches, then collates each."""
    return [collate(examples[start : start + microbatch_size]) for start in range(0, len(examples), microbatch_size)]


def collate_packs(packs: Sequence[Pack], collate: Collator, microbatch_size: int) -> list[Batch]:
    """Cuts the packs of a device batch into microbatches, each a row of its packs' samples where `collate` packs."""
    microbatches = []
    for start in range(0, len(packs), microbatch_size):
        group = packs[start : start + microbatch_size]
        batch = collate([example for pack in group for example in pack.examples])
        batch["num_packs"] = sum(not pack.is_inert for pack in group)
        batch["skipped"] = {name: reason for pack in group for name, reason in pack.skipped.items()}
        microbatches.append(batch)
    return microbatches


def count_losses(batch: Batch) -> LossCounts:
    """The denominators of one microbatch alone."""
    targets = [target for target in batch["targets"] if target is not None]
    return LossCounts(
        teacher_tokens=float((batch["label_roles"] == Role.TEACHER).sum()),
        student_tokens=float((batch["label_roles"] == Role.STUDENT).sum()),
        objects=float(sum(len(target["boxes"]) for target in targets)),
        images=float(len(targets)),
        microbatches=1.0,
    )


def split_batch(batches: list[Batch], microbatch_size: int | float, equally_many: bool = False) -> list[Batch]:
    """Tells each microbatch the loss denominators of the whole global batch: one small all-reduce a batch.

    Args:
        batches: A device batch, cut into microbatches already.
        microbatch_size: What the Trainer expects.
        equally_many: Every rank must have as many: FSDP gathers weights in each, so that one more would never end.

    Raises:
        ValueError: On every rank, where they are not equally many but must be.
    """
    assert all(batch["num_packs"] <= microbatch_size for batch in batches), (
        f"the loader cuts microbatches of {[batch['num_packs'] for batch in batches]} packs, "
        f"but the Trainer's device_train_microbatch_size is {microbatch_size}"
    )
    each = [count_losses(batch) for batch in batches]
    names = list(LossCounts.__annotations__)
    own = [*(sum(counts[name] for counts in each) for name in names), len(each) ** 2]
    sums = torch.tensor(own, dtype=torch.float64)
    if torch.distributed.is_initialized() and "nccl" in torch.distributed.get_backend():
        sums = sums.cuda()
    dist.all_reduce(sums)
    *totals, squares = sums.tolist()
    counts = LossCounts(**dict(zip(names, totals, strict=True)))
    if equally_many and counts["microbatches"] ** 2 != squares * dist.get_world_size():
        raise ValueError(
            f"this rank has {len(each)} microbatches of a step and the {dist.get_world_size()} ranks together "
            f"{counts['microbatches']:.0f}: FSDP needs equally many; give every rank as many packs"
        )
    for batch in batches:
        batch["loss_counts"] = counts
    return batches


def get_num_packs_in_batch(batch: list[Batch] | Batch) -> int:
    """Packs of a device batch or of one microbatch: the unit in which training is dealt and resumed."""
    return sum(item["num_packs"] for item in _microbatches(batch))


def get_num_samples_in_batch(batch: list[Batch] | Batch) -> int:
    """Samples of a device batch or of one microbatch, without those that only keep ranks in step."""
    return sum(item["num_samples"] for item in _microbatches(batch))


def get_num_tokens_in_batch(batch: list[Batch] | Batch) -> dict[str, int]:
    """Real tokens, and as `loss_generating` the number of microbatches.

    With `accumulate_train_batch_on_tokens` Composer weighs each microbatch by its share of the latter: by making all
    weigh the same, the loss can be divided by the global denominators instead.
    """
    microbatches = _microbatches(batch)
    return {"total": sum(item["num_tokens"] for item in microbatches), "loss_generating": len(microbatches)}


def _microbatches(batch: list[Batch] | Batch) -> list[Batch]:
    return batch if isinstance(batch, list) else [batch]


def _build_packing(
    packing: PackingConfig | None, encoder: Encoder, teachers: TeacherPool | None, streams: Sequence[Stream]
) -> Packing | None:
    if packing is None:
        return None
    max_tokens = packing.max_tokens or encoder.max_seq_len
    budget = Budget(max_tokens, packing.max_patches, packing.window, encoder.max_seq_len)
    lengths = read_length_table(streams, encoder, teachers)
    return Packing(budget, lengths, skips_long_samples=packing.on_long_sample == "skip")


def _dataloader(
    loader: LoaderConfig,
    dataset: PackStream | EvalSamples,
    batch_size: int,
    collate_fn: Callable[[Any], list[Batch]],
    **keywords: Any,
) -> DataLoader:
    given = {name: value for name, value in loader.dataloader.items() if value is not None}
    if not given.get("num_workers"):  # torch refuses keywords of workers if there are none
        given = {name: value for name, value in given.items() if name not in _OF_WORKERS}
    # The tokenizer has its own threads, which do not survive the fork into workers: it would warn in each.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return LockstepLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate_fn,
        worker_init_fn=obey_only_parent,
        generator=torch.Generator(),  # of the workers' seeds: an epoch that begins or goes on draws none of training's
        **{"pin_memory": torch.cuda.is_available(), **keywords, **given},
    )


def obey_only_parent(worker_id: int) -> None:
    """Lets a worker end on a SIGTERM of the process that made it, and on no other; a DataLoader's `worker_init_fn`.

    Schedulers send SIGTERM to all processes at once. torch's workers would end at once, and the run with an error,
    before the batch it is at can be finished and saved.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for, args=(parent.pid,), daemon=True).start()


def _wait_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
