"""What a converter finds: samples, records it leaves out, notes of what it mended; and the count of it all."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from recipe.schema import Sample


@dataclass(frozen=True)
class Rejected:
    """A record that was left out.

    Attributes:
        id: As far as it is known, else empty.
        source: The file, and the line or entry in it.
        reason: One of few, counted in the summary.
        detail: The offending value.
    """

    id: str
    source: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Note:
    """Something done to `count` parts of good records, such as boxes clipped by rounding. Strict lets it pass."""

    what: str
    count: int


Item = Sample | Rejected | Note


class Entry(Protocol):
    """One record of a data set, not yet read; a worker process reads it."""

    def fingerprint(self) -> str:
        """All that the outcome of `read` depends on, found out without decoding a picture."""
        ...

    def read(self) -> Iterator[Item]:
        """The record's sample, or why it is rejected; notes before it."""
        ...


@dataclass(frozen=True)
class Found:
    """A data set before any picture is read.

    Attributes:
        entries: Its records, in order.
        leading: What was rejected or noted on the way, before all records.
    """

    entries: Sequence[Entry]
    leading: Sequence[Rejected | Note] = ()


@dataclass
class Summary:
    """What was written; `kept` of its `parts` by an earlier run."""

    samples: int = 0
    pictures: int = 0
    not_annotated: int = 0
    empty: int = 0
    objects: int = 0
    crowd: int = 0
    shards: int = 0
    num_bytes: int = 0
    parts: int = 0
    kept: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def add(self, item: Item) -> None:
        """Counts one item."""
        if isinstance(item, Note):
            self.notes[item.what] += item.count
        elif isinstance(item, Rejected):
            self.rejected[item.reason] += 1
        else:
            self.samples += 1
            self.pictures += bool(item.image)
            self.not_annotated += item.objects is None
            self.empty += item.objects == ()
            self.objects += len(item.objects or ())
            self.crowd += sum(thing.iscrowd for thing in item.objects or ())

    def merge(self, other: "Summary") -> None:
        """Adds the counts of `other`."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                mine.update(value)
            else:
                setattr(self, name, mine + value)

    def __str__(self) -> str:
        lines = [
            f"  samples   {self.samples:>8}  ({self.pictures} with a picture, {self.empty} known to hold nothing, "
            f"{self.not_annotated} not annotated)",
            f"  objects   {self.objects:>8}  ({self.crowd} crowd regions)",
            f"  shards    {self.shards:>8}  ({self.num_bytes / 2**20:.1f} MiB)",
        ]
        lines += [f"  note      {count:>8}  {what}" for what, count in self.notes.most_common()]
        lines += [f"  rejected  {self.rejected.total():>8}"]
        lines += [f"            {count:>8}  {reason}" for reason, count in self.rejected.most_common()]
        return "\n".join(lines)
