"""Hold out a share of a conversion's records for validation: `--val-share`.

A record is held out if the hash of its image's bytes is among the lowest `share` of all hashes. It is the hash and the
rule of `val_fraction` in training, so both hold out the same images. Neither the order of the records, nor ids, workers
or other records change a record's part, and all records of one image are in one part.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import overload

import numpy as np
from numpy.typing import NDArray

from convert.items import BadRecord, Entry, Found, Note, Rejected
from recipe.records import content_hash, is_held_out

_CHUNK = 256  # records whose images a process reads before it reports
_SHOWN = 5
_SEEN = np.dtype([("content", np.uint64), ("group", np.uint64)])  # hashes of a record; 0: not read, in no group


@dataclass(frozen=True)
class Division:
    """What `--val-share`, `--val-split` and `--group-by-prefix` say.

    Attributes:
        share: Of the images, between 0 and 1; met on average.
        name: Of the part that is held out.
        separator: Images whose names agree up to the last one are in one part; None: each image on its own.
    """

    share: float
    name: str = "val"
    separator: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"--val-share {self.share:g}: must be above 0 and below 1, such as 0.1 for a tenth")
        if self.separator == "":
            raise ValueError("--group-by-prefix is empty: give the text that ends the common part of names, such as _")


@dataclass(frozen=True)
class Chosen(Sequence[Entry]):
    """Some entries of a data set, by position."""

    entries: Sequence[Entry]
    positions: NDArray[np.int64]

    @overload
    def __getitem__(self, key: int) -> Entry: ...
    @overload
    def __getitem__(self, key: slice) -> list[Entry]: ...
    def __getitem__(self, key: int | slice) -> Entry | list[Entry]:
        if isinstance(key, int):
            return self.entries[int(self.positions[key])]
        return [self.entries[position] for position in self.positions[key].tolist()]

    def __len__(self) -> int:
        return len(self.positions)


def divide(found: Found, division: Division, num_workers: int = 1) -> tuple[Found, Found]:
    """Return the records that stay and those held out, each in order; reads every image once, without decoding it.

    What cannot be read stays, to be rejected there; so do `found.leading`.

    Raises:
        ValueError: A part would be empty, or no name has the separator.
    """
    from convert.parts import map_forked  # imports torch, once for all workers

    entries, separator = found.entries, division.separator
    num_chunks = -(-len(entries) // _CHUNK)
    chunks = list(map_forked(partial(_look, entries, separator), num_chunks, len(entries), num_workers))
    seen = np.concatenate([np.empty(0, _SEEN), *chunks])
    is_read = seen["content"] != 0
    held = is_held_out(np.where(seen["group"] != 0, seen["group"], seen["content"]), division.share) & is_read
    num_held, num_read = int(held.sum()), int(is_read.sum())
    if not num_read:
        first = [f"; {item.source}: {item.reason}: {item.detail}" for item in _first_rejected(entries)]
        raise ValueError("".join(["nothing to write: no record is usable", *first]))
    if not 0 < num_held < num_read:
        side, remedy = ("the rest", "Lower") if num_held else (division.name, "Raise")
        grouped = "" if separator is None else f" with --group-by-prefix {separator}"
        raise ValueError(
            f"--val-share {division.share:g}{grouped} leaves nothing for {side}: it holds out {num_held} of "
            f"{num_read} records. {remedy} it, or convert two sets"
        )
    notes = [] if separator is None else _judge_groups(entries, separator, seen, held)
    stays, out = (Chosen(entries, np.flatnonzero(which)) for which in (~held, held))
    return Found(stays, [*found.leading, *notes], found.classes), Found(out, classes=found.classes)


def group_of(name: str, separator: str) -> str | None:
    """Return what a path's file name begins with, up to its last separator, with its folder; None without one.

    A separator with a slash ends a folder.
    """
    folder, slash, file = ("", "", name) if "/" in separator else name.rpartition("/")
    prefix, found, _ = file.rpartition(separator)
    return f"{folder}{slash}{prefix}" if found else None


def _look(
    entries: Sequence[Entry], separator: str | None, number: int, advance: Callable[[int], object]
) -> NDArray[np.void]:
    """Return the hashes (of `_SEEN`) of a chunk's records."""
    chunk = entries[number * _CHUNK : (number + 1) * _CHUNK]
    seen = np.zeros(len(chunk), _SEEN)
    for row, entry in zip(seen, chunk, strict=True):
        with suppress(BadRecord):
            names, content = entry.origin()
            row["content"] = _number(content)
            found = (group_of(name, separator) for name in names) if separator is not None else ()
            group = next((text for text in found if text is not None), None)
            row["group"] = 0 if group is None else _number(group.encode(errors="surrogatepass"))
        advance(1)
    return seen


def _first_rejected(entries: Sequence[Entry]) -> list[Rejected]:
    return [item for entry in entries[:1] for item in entry.read() if isinstance(item, Rejected)]


def _number(content: bytes) -> np.uint64:
    return np.uint64(int(content_hash(content), 16))


def _judge_groups(
    entries: Sequence[Entry], separator: str, seen: NDArray[np.void], held: NDArray[np.bool_]
) -> list[Note]:
    """Return notes on records that are in no group, and on images that groups put into both parts."""

    def names(positions: NDArray[np.int64]) -> tuple[str, ...]:
        return tuple(entries[position].origin()[0][0] for position in positions[:_SHOWN].tolist())

    alone = np.flatnonzero((seen["content"] != 0) & (seen["group"] == 0))
    if not seen["group"].any():
        raise ValueError(
            f"--group-by-prefix {separator}: no image's name has it, such as {names(alone)[0]!r}: leave it out"
        )
    shared = np.intersect1d(seen["content"][held], seen["content"][~held & (seen["content"] != 0)])
    both = np.flatnonzero(held & np.isin(seen["content"], shared))
    groups, held_groups = (len(np.unique(group[group != 0])) for group in (seen["group"], seen["group"][held]))
    notes = [Note(f"groups by {separator!r}, of which {held_groups} are held out", groups)]
    if len(alone):
        what = f"records without {separator!r} in their image's name: each is divided on its own"
        notes.append(Note(what, len(alone), names(alone)))
    if len(both):
        what = "records held out whose image is also in the other part, by a name of another group"
        notes.append(Note(what, len(both), names(both)))
    return notes
