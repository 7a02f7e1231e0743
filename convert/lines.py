"""Records of a file of JSON lines, or of one JSON array, found without holding them in memory."""

import codecs
import json
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from convert.formats import describe_other, look_at, starts_as_json
from convert.items import BadRecord, Found, Note
from convert.records import (
    FileRecord,
    Record,
    check_file,
    parse_dict,
    refuse_duplicate,
    refuse_unstated_fractions,
)
from convert.remote import root_of

_BLANK = re.compile(r"[ \t\n\r]*")
ParseEntry = Callable[[dict[str, Any]], Record]


def find_lines(
    annotations: Path,
    images: Path | None,
    parse: ParseEntry,
    formats: Sequence[str],
    renumber: bool = False,
    bbox_type: str | None = None,
    bad_boxes: str = "reject",
    follow_links: bool = False,
) -> Found:
    """Return one record per line, or per entry of an array; blank lines are skipped.

    Its id is the record's `id`, or else FILE-LINE, lines counted from 1. `parse` makes a record of a JSON object; image
    paths are relative to the folder `images`, without which only records of texts are kept. `renumber`: if ids repeat,
    FILE-LINE is the id of every record; otherwise the first has it and later ones are rejected. For the other keywords
    see `list_records`.

    Raises:
        ValueError: `annotations` is not a file or looks like one of a format that is not in `formats`, `images` is not
            a folder, or all boxes are fractions and nothing says so.
    """
    check_file(annotations, f"a file of JSON lines for convert.{formats[0]}")
    wanted = f"JSON lines for convert.{formats[0]}"
    if look_at(annotations)[1] not in (*formats, ""):
        raise ValueError(describe_other(annotations, wanted))
    make = partial(
        FileRecord, root_of(images), bbox_type=bbox_type or "real", bad_boxes=bad_boxes, follow_links=follow_links
    )
    records = _Lines(annotations, parse, make)
    if not records.has_object and (len(records) != 1 or not starts_as_json(annotations)):
        raise ValueError(describe_other(annotations, wanted))
    leading = []
    if renumber and records.repeated:
        leading.append(
            Note("ids that an earlier record has: FILE-LINE is the id of every record", len(records.repeated))
        )
        records.is_numbered = True
    refuse_unstated_fractions(records, bbox_type)
    return Found(records, leading)


class _Lines(Sequence[FileRecord]):
    """The records, read from the file again each time that one is asked for.

    Attributes:
        spans: (start, end) of each record in the file, in bytes, flat.
        numbers: Of its line, or of its place in the array, from 1.
        has_object: Whether a record is a JSON object with an id that can be used.
        repeated: Positions of records whose id an earlier one has.
        is_numbered: Ids of records are not used.
    """

    def __init__(self, path: Path, parse: ParseEntry, make: Callable[..., FileRecord]) -> None:
        self.path, self.stem, self.parse, self.make, self.is_numbered = path, path.stem, parse, make, False
        self.spans, self.numbers, self.has_object = array("Q"), array("Q"), False
        hashes = array("q")
        with path.open("rb") as lines, path.open("rb") as file:
            spans = _array_spans(lines)
            lines.seek(0)
            self.place = "line" if spans is None else "record"
            for number, start, end in _line_spans(lines) if spans is None else spans:
                self.spans.extend((start, end))
                self.numbers.append(number)
                file.seek(start)
                line, sample_id = file.read(end - start), f"{self.stem}-{number:06d}"
                # Parsing takes most of the time: a record without an id is parsed later alone. Escapes may spell "id".
                if not self.has_object or b'"id"' in line or b"\\u00" in line:
                    sample_id, parse = self._read(file, len(hashes))
                    self.has_object = self.has_object or parse.func is not _refuse
                hashes.append(hash(sample_id))
            self.repeated = frozenset(self._find_repeated(file, np.frombuffer(hashes, np.int64)))

    def _find_repeated(self, file: BinaryIO, hashes: np.ndarray) -> Iterator[int]:
        """Yield what `repeated` holds: eight bytes per id are kept until here, not the ids."""
        _, owner, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        groups: dict[int, set[str]] = defaultdict(set)
        for position in np.flatnonzero(counts[owner] > 1).tolist():
            sample_id, seen = self._read(file, position)[0], groups[int(owner[position])]
            if sample_id in seen:
                yield position
            seen.add(sample_id)

    def _read(self, file: BinaryIO, position: int) -> tuple[str, "partial[Record]"]:
        """Return the id of a record, and what parses it."""
        start, end = self.spans[2 * position : 2 * position + 2]
        file.seek(start)
        sample_id = f"{self.stem}-{self.numbers[position]:06d}"
        try:
            entry = _parse_line(file.read(end - start))
            stated = _parse_id(entry)
            return sample_id if stated is None or self.is_numbered else stated, partial(self.parse, entry)
        except BadRecord as error:
            return sample_id, partial(_refuse, error)

    @overload
    def __getitem__(self, key: int) -> FileRecord: ...
    @overload
    def __getitem__(self, key: slice) -> list[FileRecord]: ...
    def __getitem__(self, key: int | slice) -> FileRecord | list[FileRecord]:
        positions = range(len(self))[key]
        if isinstance(positions, int):
            return self[positions : positions + 1][0]
        records = []
        with self.path.open("rb") as file:
            for position in positions:
                sample_id, parse = self._read(file, position)
                if position in self.repeated and not self.is_numbered:
                    parse = partial(refuse_duplicate, sample_id)
                source = f"{self.path.name}: {self.place} {self.numbers[position]}"
                records.append(self.make(id=sample_id, source=source, parse=parse))
        return records

    def __iter__(self) -> Iterator[FileRecord]:
        for start in range(0, len(self), 256):
            yield from self[start : start + 256]

    def __len__(self) -> int:
        return len(self.numbers)


def _refuse(error: BadRecord) -> Record:
    raise error


def _line_spans(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Yield (number, start, end) of the lines that are not blank."""
    end = 0
    for number, line in enumerate(file, start=1):
        start, end = end, end + len(line)
        if line.strip():
            yield number, start, end


def _array_spans(file: BinaryIO) -> list[tuple[int, int, int]] | None:
    """Return (number, start, end) of the entries of a file that is one JSON array with objects; None if it is not."""
    if not file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return None
    file.seek(0)
    decode = json.JSONDecoder().raw_decode
    spans, has_object = array("Q"), False
    try:
        text = file.read().decode()
        position, last, size = text.index("[") + 1, 0, 0  # `size`: bytes of the characters before `last`
        while True:
            position = _skip_blank(text, position)
            value, end = decode(text, position)
            has_object = has_object or isinstance(value, dict)
            start = size + len(text[last:position].encode())
            last, size = end, start + len(text[position:end].encode())
            spans.extend((start, size))
            position = _skip_blank(text, end) + 1
            if text[position - 1] != ",":
                break
        whole = text[position - 1] == "]" and not text[position:].strip()
    except (ValueError, IndexError, RecursionError):
        return None
    if not (whole and has_object):
        return None
    return list(zip(range(1, len(spans) // 2 + 1), spans[::2], spans[1::2], strict=True))


def _skip_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    assert match is not None
    return match.end()


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = f"is not one JSON object on one line ({error})"
        if isinstance(error, UnicodeDecodeError):
            what = "is not UTF-8: save the file as UTF-8"
        raise BadRecord("malformed json", f"{line[:60].decode(errors='replace').strip()!r} {what}") from error
    return parse_dict(value, "the record")


def _parse_id(entry: dict[str, Any]) -> str | None:
    sample_id = entry.get("id")
    if sample_id is None:
        return None
    if isinstance(sample_id, bool) or not isinstance(sample_id, int | str) or sample_id == "":
        raise BadRecord("malformed record", f"id is {sample_id!r}, not text or a whole number")
    return str(sample_id)
