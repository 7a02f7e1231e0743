"""What a converter finds: samples, records it leaves out, notes on what it fixed; and the count of it all."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from textwrap import shorten
from typing import Any, Protocol

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


class BadRecord(ValueError):
    """A record that must be left out, with its reason and the offending value."""

    def __init__(self, reason: str, detail: object = "") -> None:
        self.reason = reason
        text = str(detail)  # which may quote a whole record
        self.detail = text if len(text) <= 400 else f"{text[:200]} ... {text[-100:]}"
        super().__init__(f"{reason}: {self.detail}")


class BadBox(BadRecord):
    """A box that cannot be used; `--bad-boxes` says what that costs."""


@dataclass(frozen=True)
class Note:
    """Something done to `count` parts of good records, such as boxes clipped by rounding. Not an error for --strict.

    `examples` name the parts; the summary shows the first few.
    """

    what: str
    count: int
    examples: tuple[str, ...] = ()


Item = Sample | Rejected | Note
MOST_CAPTIONS = 20_000  # counted one by one: more than any set's classes, but captions in free text may all differ
_SHOWN_CAPTIONS = 10
_SHOWN_EXAMPLES = 5


class Entry(Protocol):
    """One record of a data set, not yet read; a worker process reads it."""

    def fingerprint(self) -> str:
        """Return all that the result of `read` depends on, without decoding an image."""
        ...

    def origin(self) -> tuple[Sequence[str], bytes]:
        """Return names, that of its image before its id, and the bytes of its image; without one, of its chat.

        Raises:
            BadRecord: They cannot be read, so `read` rejects it.
        """
        ...

    def read(self) -> Iterator[Item]:
        """Yield notes, then the record's sample or why it is rejected."""
        ...


@dataclass(frozen=True)
class Found:
    """A data set before any image is read.

    Attributes:
        entries: Its records, in order.
        leading: What was rejected or noted on the way, before all records.
        classes: The captions that its objects can have, in the source's order, if it lists them; else empty.
    """

    entries: Sequence[Entry]
    leading: Sequence[Rejected | Note] = ()
    classes: Sequence[str] = ()


@dataclass
class Summary:
    """What was written; `kept` of its `parts` by an earlier run.

    `captions` counts the objects per caption, crowds left out; it stops at more than `MOST_CAPTIONS` different ones.
    """

    samples: int = 0
    images: int = 0
    not_annotated: int = 0
    empty: int = 0
    objects: int = 0
    crowd: int = 0
    shards: int = 0
    num_bytes: int = 0
    parts: int = 0
    kept: int = 0
    captions: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    several: int = 0  # samples of several images

    def add(self, item: Item) -> None:
        """Count one item."""
        if isinstance(item, Note):
            self.notes[item.what] += item.count
            self._add_examples(item.what, item.examples)
        elif isinstance(item, Rejected):
            self.rejected.append(item)
        else:
            self.samples += 1
            self.several += bool(item.further)
            for view in item.per_image():
                objects = view.objects or ()
                self.images += bool(view.image)
                self.not_annotated += view.objects is None
                self.empty += view.objects == ()
                self.objects += len(objects)
                self.crowd += sum(thing.iscrowd for thing in objects)
                if len(self.captions) <= MOST_CAPTIONS:
                    self.captions.update(thing.caption for thing in objects if not thing.iscrowd)

    def merge(self, other: "Summary") -> None:
        """Add the counts of `other`."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                if name != "captions" or len(mine) <= MOST_CAPTIONS:
                    mine.update(value)
            elif name == "examples":
                for what, examples in value.items():
                    self._add_examples(what, examples)
            else:
                setattr(self, name, mine + value)

    def _add_examples(self, what: str, examples: Sequence[str]) -> None:
        if examples:
            self.examples[what] = [*self.examples.get(what, ()), *examples][:_SHOWN_EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {**vars(self), "rejected": [asdict(item) for item in self.rejected]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Summary":
        """Return the summary that `to_json` was called on."""
        summary = cls(**{**value, "rejected": [Rejected(**item) for item in value["rejected"]]})
        summary.captions, summary.notes = Counter(summary.captions), Counter(summary.notes)
        return summary

    def __str__(self) -> str:
        held = f"{self.images} images, {self.several} samples with several" if self.several else None
        lines = [
            f"  samples   {self.samples:>8}  ({held or f'{self.images} with an image'}, {self.empty} known to hold "
            f"nothing, {self.not_annotated} not annotated)",
            f"  objects   {self.objects:>8}  ({self.crowd} crowd regions)",
        ]
        if self.captions:
            number = len(self.captions)
            shown = [f"{shorten(text, 40)} {count}" for text, count in self.captions.most_common(_SHOWN_CAPTIONS)]
            more = f", and {number - len(shown)} more" if number > len(shown) else ""
            line = f"{number:>8}  ({', '.join(shown)}{more})"
            if number > MOST_CAPTIONS:
                line = f"{f'> {MOST_CAPTIONS}':>8}  (different ones)"
            lines.append(f"  captions  {line}")
        lines.append(f"  shards    {self.shards:>8}  ({self.num_bytes / 2**20:.1f} MiB)")
        for what, count in self.notes.most_common():
            shown = self.examples.get(what, [])
            more = ", ..." if 0 < len(shown) < count else ""
            lines.append(f"  note      {count:>8}  {what}" + (f" ({', '.join(shown)}{more})" if shown else ""))
        lines += [f"  rejected  {len(self.rejected):>8}"]
        reasons = Counter(item.reason for item in self.rejected)
        lines += [f"            {count:>8}  {reason}" for reason, count in reasons.most_common()]
        return "\n".join(lines)
