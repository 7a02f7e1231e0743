"""What an epoch of the training set holds, from plans and kept counts: no image is read."""

from dataclasses import dataclass

import numpy as np

from recipe.data.stream import PackStream


@dataclass(frozen=True)
class EpochContents:
    """Counts of one epoch over all ranks; None: unknown, as a stream has no records."""

    num_stored: int  # training samples of all streams
    num_images: int | None  # different ones among them
    num_objects: int | None  # of them, that the head learns
    num_samples: int  # that the epoch reads; a repeated one counts each time
    num_packs: int
    tokens: int | None  # that the epoch reads, teachers and image tokens included, padding not
    tokens_otherwise: int | None  # of the same samples, if the epoch had answers but now has none, or the reverse
    passes: dict[str, float]  # how often the epoch reads each sample of a stream, on average
    samples_per_image: float = 1.0  # that hold it, on average

    @property
    def tokens_per_pack(self) -> float | None:
        """Return the mean of the epoch's packs."""
        return None if self.tokens is None else self.tokens / self.num_packs


def epoch_contents(dataset: PackStream, epoch: int) -> EpochContents:
    """Count what an epoch reads; with or without answers as the epoch in progress."""
    plan, lengths, hashes, is_trained = dataset.plan(epoch), dataset.lengths, dataset.image_hashes, dataset.is_trained
    passes = {}
    spans = zip(dataset.sample_offset_per_stream.tolist(), dataset.samples_per_stream.tolist(), strict=True)
    reads = np.bincount(plan.samples, minlength=dataset.num_samples)
    for number, (stream, (first, length)) in enumerate(zip(dataset.streams, spans, strict=True)):
        of_stream = slice(first, first + length)
        num_trained = int(is_trained[of_stream].sum())
        passes[getattr(stream, "key", str(number))] = int(reads[of_stream].sum()) / max(1, num_trained)
    num_images, samples_per_image = None, 1.0
    if lengths is not None and hashes is not None:
        with_image = hashes.of(is_trained & (lengths.samples.patches > 0))
        num_images = len(np.unique(with_image))
        samples_per_image = len(with_image) / max(1, num_images)
    return EpochContents(
        num_stored=int(is_trained.sum()),
        num_images=num_images,
        num_objects=None if lengths is None else int(lengths.samples.num_objects[is_trained].sum()),
        num_samples=len(plan.samples),
        num_packs=plan.num_packs,
        tokens=epoch_tokens(dataset, epoch, dataset.with_answers),
        tokens_otherwise=epoch_tokens(dataset, epoch, not dataset.with_answers),
        passes=passes,
        samples_per_image=samples_per_image,
    )


def epoch_tokens(dataset: PackStream, epoch: int, with_answers: bool) -> int | None:
    """Return the tokens of the samples that an epoch reads, with answers or without; None if unknown."""
    if dataset.lengths is None:
        return None
    plan = dataset.plan(epoch)
    if with_answers == dataset.with_answers and (planned := int(plan.tokens.sum())):  # 0 without packing
        return planned
    _, samples = dataset.epoch_samples(epoch)
    tokens, _ = dataset.lengths.of_epoch(epoch, samples, 0, with_answers)
    return int(tokens[plan.occurrences].sum())
