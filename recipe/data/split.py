"""A validation split taken from the training set: `val_fraction`.

An image is held out if the hash of its bytes is among the lowest `val_fraction` of all hashes. So neither the order of
the data, nor its shards, seeds, ranks or other images change its side, and all samples of one image are on one side.
`--val-share` of a conversion follows the same rule, so what it left for training has no image among the lowest hashes.
The share is met on average: of 80 images at 0.05 some splits hold out 2, others 7.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, UInt64

from recipe.config import ConfigError, LoaderConfig, RecipeConfig
from recipe.data.lengths import Arrays, KeptCount, none_if_unknown
from recipe.records import RECORDS_FILE, is_held_out, read_image_hashes
from recipe.upstream.agreement import from_rank_0
from recipe.upstream.checked_stream import CheckedStream

_SAMPLING = ("choose", "repeat", "proportion")  # of training; a validation set is read once


@dataclass(frozen=True)
class Split:
    """Which samples of a training set are held out for evaluation."""

    fraction: float
    hashes: UInt64[np.ndarray, " N"]  # of each stored sample's image, or of its chat without one

    @property
    def is_validation(self) -> Bool[np.ndarray, " N"]:
        """Return which stored samples are held out."""
        return is_held_out(self.hashes, self.fraction)

    def describe(self) -> str:
        """Return how much is held out, such as `4 of 80 images`."""
        of_images = len(np.unique(self.hashes[self.is_validation])), len(np.unique(self.hashes))
        of_samples = int(self.is_validation.sum()), len(self.hashes)
        images = f"{of_images[0]} of {of_images[1]} images"
        return images if of_images == of_samples else f"{images}, {of_samples[0]} of {of_samples[1]} samples"


def split_streams(streams: Sequence[CheckedStream], fraction: float | None) -> Split | None:
    """Return the split of all streams' samples, None if `fraction` is; all ranks must call it.

    Raises:
        ConfigError: A stream has no records or no hashes of its images, or a side of the split would be empty.
    """
    if fraction is None:
        return None
    split = Split(
        fraction, from_rank_0(lambda: np.concatenate([_KEPT_HASHES.of(stream)["hashes"] for stream in streams]))
    )
    if split.is_validation.all() or not split.is_validation.any():
        side, remedy = "validation", "Raise it (above --val-share, if the conversion held images out)"
        if split.is_validation.all():
            side, remedy = "training", "Lower it"
        raise ConfigError(
            f"val_fraction {fraction} leaves nothing for {side}: it holds out {split.describe()}. "
            f"{remedy}, or set val_fraction=null and give eval_loader.streams"
        )
    return split


def read_known_hashes(streams: Sequence[CheckedStream]) -> UInt64[np.ndarray, " N"] | None:
    """Return the hashes of `Split`, None if a stream has none; all ranks must call it."""
    return from_rank_0(
        lambda: none_if_unknown(lambda: np.concatenate([_KEPT_HASHES.of(stream)["hashes"] for stream in streams]))
    )


def evaluation_loader(config: RecipeConfig) -> LoaderConfig:
    """Return `eval_loader`, with the training streams if `val_fraction` is set.

    A stream with a `remote` gets a cache of its own: Streaming does not share one between two data sets.
    """
    if config.val_fraction is None:
        return config.eval_loader
    streams = {}
    for name, keywords in config.train_loader.streams.items():
        kept = {key: value for key, value in keywords.items() if key not in _SAMPLING}
        if kept.get("remote") is not None and kept.get("local") is not None:
            kept["local"] = f"{kept['local'].rstrip('/')}-validation"
        streams[name] = kept
    return replace(config.eval_loader, streams=streams)


def _parse_hashes(hashes: Iterable[str]) -> Arrays:
    found = list(hashes)
    if not all(found):
        raise ConfigError(
            f"val_fraction: a {RECORDS_FILE} was written by an earlier version and holds no hashes of images: convert "
            "the data set again, or give eval_loader.streams"
        )
    return {"hashes": np.array([int(text, 16) for text in found], dtype=np.uint64)}


_KEPT_HASHES = KeptCount(
    name="image_hashes",
    fingerprint="1",
    what="different images",
    remedy="give eval_loader.streams instead of val_fraction",
    count=_parse_hashes,
    read=read_image_hashes,
)
