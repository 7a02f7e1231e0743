"""A validation split taken from the training set: `val_fraction`.

An image is held out if the hash of its bytes is among the lowest `val_fraction` of all hashes. So neither the order of
the data, nor its shards, seeds, ranks or other images change its side, and all samples of one image are on one side.
`--val-share` of a conversion follows the same rule, so what it left for training has no image among the lowest hashes.
The share is met on average: of 80 images at 0.05 some splits hold out 2, others 7. A sample of several images is held
out if one of them is: so no image that is held out is trained on, but one that is evaluated together with it may be.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from recipe.config import ConfigError, LoaderConfig, RecipeConfig
from recipe.data.kept import KeptCount, none_if_unknown
from recipe.data.mapped import Arrays, shared_arrays
from recipe.records import RECORDS_FILE, is_held_out, read_image_hashes
from recipe.upstream.checked_stream import CheckedStream

_SAMPLING = ("choose", "repeat", "proportion")  # of training; a validation set is read once


@dataclass(frozen=True)
class ImageHashes:
    """Which images the stored samples hold: equal hashes for equal bytes."""

    first: UInt64[np.ndarray, " N"]  # of each sample's first image, or of its chat without one
    further: UInt64[np.ndarray, " F"]  # of all images after the first
    owners: Int64[np.ndarray, " F"]  # the sample of each further one

    def of(self, chosen: Bool[np.ndarray, " N"]) -> UInt64[np.ndarray, " M"]:
        """Return the hashes of all images of the chosen samples."""
        return np.concatenate([self.first[chosen], self.further[chosen[self.owners]]])

    def least(self) -> UInt64[np.ndarray, " N"]:
        """Return the lowest hash of each sample's images."""
        lowest = self.first.copy()
        np.minimum.at(lowest, self.owners, self.further)
        return lowest


@dataclass(frozen=True)
class Split:
    """Which samples of a training set are held out for evaluation."""

    fraction: float
    images: ImageHashes

    @property
    def is_validation(self) -> Bool[np.ndarray, " N"]:
        """Return which stored samples are held out."""
        return is_held_out(self.images.least(), self.fraction)

    def describe(self) -> str:
        """Return how much is held out, such as `4 of 80 images`."""
        distinct = np.unique(self.images.of(np.ones_like(self.is_validation)))
        of_images = int(is_held_out(distinct, self.fraction).sum()), len(distinct)
        of_samples = int(self.is_validation.sum()), len(self.images.first)
        images = f"{of_images[0]} of {of_images[1]} images"
        return images if of_images == of_samples else f"{images}, {of_samples[0]} of {of_samples[1]} samples"


def split_streams(streams: Sequence[CheckedStream], fraction: float | None) -> Split | None:
    """Return the split of all streams' samples, None if `fraction` is; all ranks must call it.

    Raises:
        ConfigError: A stream has no records or no hashes of its images, or a side of the split would be empty.
    """
    if fraction is None:
        return None
    split = Split(fraction, ImageHashes(**shared_arrays(lambda: _read_hashes(streams))))
    if split.is_validation.all() or not split.is_validation.any():
        side, remedy = "validation", "Raise it (above --val-share, if the conversion held images out)"
        if split.is_validation.all():
            side, remedy = "training", "Lower it"
        raise ConfigError(
            f"val_fraction {fraction} leaves nothing for {side}: it holds out {split.describe()}. "
            f"{remedy}, or set val_fraction=null and give eval_loader.streams"
        )
    return split


def read_known_hashes(streams: Sequence[CheckedStream]) -> ImageHashes | None:
    """Return the hashes of `Split`, None if a stream has none; all ranks must call it."""
    found = shared_arrays(lambda: none_if_unknown(lambda: _read_hashes(streams)))
    return None if found is None else ImageHashes(**found)


def _read_hashes(streams: Sequence[CheckedStream]) -> Arrays:
    """Return the arrays of `ImageHashes`."""
    empty, start, parts = np.empty(0, dtype=np.uint64), 0, []
    for stream in streams:
        kept = _KEPT_HASHES.of(stream)
        owners = kept.get("owners", empty).astype(np.int64) + start  # absent if no sample has several images
        parts.append((kept["hashes"], kept.get("further", empty), owners))
        start += len(kept["hashes"])
    names = ("first", "further", "owners")
    return dict(zip(names, (np.concatenate(column) for column in zip(*parts, strict=True)), strict=True))


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


def _parse_hashes(hashes: Iterable[list[str]]) -> Arrays:
    found = list(hashes)
    if not all(map(all, found)):
        raise ConfigError(
            f"val_fraction: a {RECORDS_FILE} was written by an earlier version and holds no hashes of images: convert "
            "the data set again, or give eval_loader.streams"
        )
    arrays = {"hashes": np.array([int(first, 16) for first, *_ in found], dtype=np.uint64)}
    further = [(int(text, 16), owner) for owner, (_, *rest) in enumerate(found) for text in rest]
    if further:
        values, owners = zip(*further, strict=True)
        arrays |= {"further": np.array(values, dtype=np.uint64), "owners": np.array(owners, dtype=np.int64)}
    return arrays


_KEPT_HASHES = KeptCount(
    name="image_hashes",
    fingerprint="1",
    what="different images",
    remedy="give eval_loader.streams instead of val_fraction",
    count=_parse_hashes,
    read=read_image_hashes,
)
