"""Count the denominators of the loss terms over the whole global batch, before the forward pass.

They are part of the terms' definition, so the loader does not count them. Composer splits training batches through the
loader's DataSpec, so the loader receives `split_batch` as an argument.
"""

import torch
from composer.utils import dist

from recipe.schema import Batch, CountedBatch, LossCounts, Role

UNIT_COUNTS = LossCounts(teacher_tokens=1, student_tokens=1, objects=1, images=1, microbatches=1)


def count_losses(batch: Batch) -> LossCounts:
    """Return the denominators of one microbatch alone."""
    targets = [target for target in batch["targets"] if target is not None]
    return LossCounts(
        teacher_tokens=float((batch["label_roles"] == Role.TEACHER).sum()),
        student_tokens=float((batch["label_roles"] == Role.STUDENT).sum()),
        objects=float(sum(len(target["boxes"]) for target in targets)),
        images=float(len(targets)),
        microbatches=1.0,
    )


def split_batch(batches: list[Batch], microbatch_size: int | float, equally_many: bool = False) -> list[CountedBatch]:
    """Give each microbatch the loss denominators of the whole global batch, by one small all-reduce per batch.

    `batches` are the microbatches of a device batch; `microbatch_size`, in packs, is what the Trainer expects.
    `equally_many` requires as many on every rank: FSDP gathers weights in each, so a rank with one more would wait
    indefinitely.

    Raises:
        ValueError: On every rank, if the numbers differ but must not.
    """
    packs = [batch["num_packs"] for batch in batches]
    message = f"the loader cuts microbatches of {packs} packs, but device_train_microbatch_size is {microbatch_size}"
    assert all(count <= microbatch_size for count in packs), message
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
            f"this rank has {len(each)} microbatches per step, all {dist.get_world_size()} ranks together "
            f"{counts['microbatches']:.0f}: FSDP needs the same number on each; give every rank equally many packs"
        )
    return [CountedBatch(**batch, loss_counts=counts) for batch in batches]
