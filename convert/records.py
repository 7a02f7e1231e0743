"""What makes a record good: the checks of every format on its way to a `Sample`."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from convert import remote
from convert.chats import check_messages, check_text
from convert.image_files import check_content, find_image, read_bytes, read_image, stamp
from convert.items import BadBox, BadRecord, Item, Note, Rejected
from recipe.records import content_hash
from recipe.schema import Box, FurtherImage, Message, Object, Sample, Searched

ROUNDING = 1.0  # a box may stick out of the image by this many pixels: it is clipped and counted
BBOX_TYPES = {"real": None, "norm1": 1.0, "norm1000": 1000.0}  # what a box's numbers are parts of; real: pixels
BAD_BOXES = ("reject", "drop")
# VOC boxes lose 1 on the way, and fractions may stick out a little: no set of pixel boxes is within this.
_FRACTIONS_END = 1.5


@dataclass(frozen=True)
class Record:
    """What a format file says about one record, not yet checked against the image.

    Attributes:
        image: Path under the image root, or None for a text-only record.
        size: Stated (width, height) of the displayed image, or None.
        bbox_type: One of `BBOX_TYPES` if the record states it, else that of its file applies.
        labels: What messages call each object; default: object 1, object 2, ...
        notes: What was done to it while parsing.
        searched: See `Sample`.
        content: The image's bytes if the annotations hold them; `image` is then its name.
        further: Of a chat of several images those after the first, without messages of their own.
    """

    image: str | None
    objects: Sequence[Object] | None
    size: tuple[float, float] | None = None
    messages: Sequence[Message] | None = None
    bbox_type: str | None = None
    labels: Sequence[str] = ()
    notes: tuple[Note, ...] = ()
    searched: Searched | None = None
    content: bytes | None = None
    further: tuple["Record", ...] = ()

    def label(self, position: int) -> str:
        """Return what messages call the object at `position`."""
        return self.labels[position] if self.labels else f"object {position + 1}"


Parse = Callable[[], Record]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A record of a format file, not yet parsed: an `Entry`.

    Attributes:
        image_root: Absolute path or address of the images' folder, or empty; nothing outside is read, unless by
            `follow_links`.
        source: Its file and place in it, for the reader of rejected.jsonl.
        parse: Makes the record; may raise `BadRecord`.
        bbox_type: One of `BBOX_TYPES`, for records that state none.
        bad_boxes: One of `BAD_BOXES`: what a box that cannot be used costs.
        follow_links: Images may be links to outside `image_root`.
    """

    image_root: str
    id: str
    source: str
    parse: Parse
    bbox_type: str = "real"
    bad_boxes: str = "reject"
    follow_links: bool = False

    def fingerprint(self) -> str:
        """Return what the file says, and the size and time of the image it names."""
        try:
            record, files = self.parse(), list[object]()
            for held in (record, *record.further):
                if held.content is not None:
                    record = replace(record, content=None)
                    files.append(hashlib.sha256(held.content).hexdigest())
                elif held.image is not None:
                    files.append(stamp(find_image(self.image_root, held.image, self.follow_links)))
        except BadRecord as error:
            return repr((self.id, self.source, str(error)))
        return repr((self.id, self.source, record, files, self.bbox_type, self.bad_boxes))

    def origin(self) -> tuple[Sequence[str], bytes]:
        """Return names and content; see `Entry`."""
        record = self.parse()
        if record.image is None:
            return (self.id,), json.dumps(record.messages and list(record.messages)).encode()
        contents = []
        for held in (record, *record.further):
            assert held.image is not None
            path = find_image(self.image_root, held.image, self.follow_links) if held.content is None else ""
            contents.append(read_bytes(path) if held.content is None else held.content)
        # Of several images the one that decides: a sample is held out if one of its images is.
        return (record.image.replace("\\", "/"), self.id), min(contents, key=content_hash)

    def read(self) -> Iterator[Item]:
        """Yield the sample (after notes on what was done to it), or why it is rejected."""
        try:
            check_text(self.id)
            record = self.parse()
            sample, notes = self._check(record)
        except BadRecord as error:
            yield Rejected(self.id, self.source, error.reason, error.detail)
            return
        yield from record.notes
        yield from notes
        yield sample

    def _check(self, record: Record) -> tuple[Sample, list[Note]]:
        """Return the sample, and notes on boxes that were clipped or left out."""
        messages = None if record.messages is None else tuple(record.messages)
        num_images = 0 if record.image is None else 1 + len(record.further)
        check_messages(messages or (), num_images)
        if record.image is None:
            if messages is None:
                raise BadRecord("neither image nor messages")
            if record.objects:
                raise BadRecord("objects without an image", f"{len(record.objects)} objects")
            return Sample(self.id, b"", 0, 0, None, messages), []
        if record.further and messages is None:
            raise BadRecord("more than one image", f"{num_images} images and no messages: write a record for each")
        checked = [self._check_image(held) for held in (record, *record.further)]
        (first, *further), notes = [image for image, _ in checked], [note for _, own in checked for note in own]
        if messages is not None:
            sizes = [(image.width, image.height) for image in (first, *further)]
            messages = tuple(self._check_box_parts(record, message, sizes) for message in messages)
        for caption in (*record.searched.absent, *record.searched.incomplete) if record.searched else ():
            check_text(caption)
        given = {"messages": messages, "searched": record.searched, "further": tuple(further)}
        return Sample(self.id, **vars(first), **given), notes

    def _check_image(self, record: Record) -> tuple[FurtherImage, list[Note]]:
        """Return the image of a record with its objects, and notes on them."""
        assert record.image is not None
        if record.content is None:
            data, width, height = read_image(find_image(self.image_root, record.image, self.follow_links))
        else:
            data, (width, height) = record.content, check_content(record.content, record.image)
        if record.size is not None and record.size != (width, height):
            stated = f"{record.size[0]:g}x{record.size[1]:g}"
            raise BadRecord("wrong size", f"stated {stated}, the displayed image is {width}x{height}")
        objects, notes = None, []
        if record.objects is not None:
            objects, notes = self._check_objects(record, width, height)
        return FurtherImage(data, width, height, objects), notes

    def _check_box_parts(self, record: Record, message: Message, sizes: Sequence[tuple[int, int]]) -> Message:
        """Return a message whose boxes, from `fill_placeholders`, are checked and in pixels of images of `sizes`."""
        if isinstance(message["content"], str):
            return message
        parts = []
        for part in message["content"]:
            if part["type"] == "box":
                width, height = sizes[part.get("image", 0)]
                item = to_pixels(Object(part["box"], "<bbox>"), record.bbox_type or self.bbox_type, width, height)
                try:
                    box = check_object(item, width, height, clip=self.bad_boxes == "drop").box
                except BadBox as error:
                    raise BadRecord(error.reason, f"{error.detail}, which messages name as <bbox>") from error
                part = {**part, "box": list(box)}
            parts.append(part)
        return {**message, "content": parts}

    def _check_objects(self, record: Record, width: int, height: int) -> tuple[tuple[Object, ...], list[Note]]:
        objects, notes, error = [], [], None
        for position, item in enumerate(record.objects or ()):
            label = record.label(position)
            item = to_pixels(item, record.bbox_type or self.bbox_type, width, height)
            try:
                checked = check_object(item, width, height, clip=self.bad_boxes == "drop")
            except BadBox as failure:
                error = BadRecord(failure.reason, f"{label}: {failure.detail}")
                if self.bad_boxes == "reject":
                    raise error from failure
                notes.append(Note(f"box left out: {failure.reason}", 1, (f"{self.id}: {label}",)))
                continue
            except BadRecord as failure:
                raise BadRecord(failure.reason, f"{label}: {failure.detail}") from failure
            objects.append(checked)
            if checked.box == item.box:
                continue
            if _excess(item.box, width, height) > ROUNDING + 1e-6:
                notes.append(Note("box beyond the image clipped", 1, (f"{self.id}: {label}",)))
            else:
                notes.append(Note("boxes clipped to the image by rounding", 1))
        if error is not None and not objects:
            raise BadRecord(error.reason, f"{error.detail}; no box is left, but the image is not known to be empty")
        return tuple(objects), notes


def list_records(
    image_root: Path,
    rows: Iterable[tuple[str, str, Parse]],
    bbox_type: str | None = None,
    bad_boxes: str = "reject",
    follow_links: bool = False,
) -> list[FileRecord]:
    """Return the records of a format file, in order; the first with an id owns it, later ones are rejected.

    `rows` are (id, source, parse) of each record; the id is empty if it has none. The others are the command line's.

    Raises:
        ValueError: `image_root` is not a folder, or all boxes are fractions and `bbox_type` does not say so.
    """
    root, owned, records = remote.root_of(image_root), set(), []
    for sample_id, source, parse in rows:
        if sample_id and sample_id in owned:
            parse = partial(refuse_duplicate, sample_id)
        owned.add(sample_id)
        records.append(FileRecord(root, sample_id, source, parse, bbox_type or "real", bad_boxes, follow_links))
    refuse_unstated_fractions(records, bbox_type)
    return records


def refuse_unstated_fractions(records: Iterable[FileRecord], bbox_type: str | None) -> None:
    """Raise ValueError if no box reaches beyond 0 to 1, unless `bbox_type` allows that."""
    if bbox_type in (None, "norm1000"):
        refuse_fractions(records, "if they are fractions of the image, give --bbox-type norm1, else --bbox-type real")


def refuse_fractions(records: Iterable[FileRecord], remedy: str) -> None:
    """Raise ValueError with this remedy if no box reaches beyond 0 to 1; the first ordinary box ends the search."""
    num_boxes = 0
    for entry in records:
        try:
            record = entry.parse()
        except BadRecord:
            continue
        if record.bbox_type is not None:
            continue
        for item in (item for held in (record, *record.further) for item in held.objects or ()):
            if any(abs(value) > _FRACTIONS_END for value in item.box):
                return
            num_boxes += 1
    if num_boxes:
        raise ValueError(f"all {num_boxes} boxes lie within 0 to 1: {remedy}")


def to_pixels(item: Object, bbox_type: str, width: int, height: int) -> Object:
    """Return the object with its box in pixels; its area, in unknown units then, is left out if the box was not."""
    whole = BBOX_TYPES[bbox_type]
    if whole is None:
        return item
    x1, y1, x2, y2 = item.box
    box = (x1 * width / whole, y1 * height / whole, x2 * width / whole, y2 * height / whole)
    return replace(item, box=box, area=None)


def check_file(path: Path, wanted: str) -> None:
    """Raise ValueError if the annotation file is not there."""
    if not path.is_file():
        raise ValueError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give {wanted}")


def refuse_duplicate(sample_id: str) -> Record:
    """Raise `BadRecord`: an earlier record has this id."""
    raise BadRecord("duplicate id", f"an earlier record has the id {sample_id!r}")


def check_object(item: Object, width: int, height: int, clip: bool = False) -> Object:
    """Return the object, its box cut to the image if it sticks out by at most `ROUNDING` pixels, or if `clip`.

    Raises:
        BadBox: The box is not finite, inverted, of no area or outside the image.
        BadRecord: The caption is empty or holds a control token.
    """
    if not item.caption and not item.iscrowd:
        raise BadRecord("empty caption", f"box {item.box}")
    check_text(item.caption)
    _check_extent(item.box)
    excess = _excess(item.box, width, height)
    if excess <= 0:
        return item
    where = f"{item.box} in an image of {width}x{height}"
    x1, y1, x2, y2 = item.box
    outside = x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height
    if excess > ROUNDING + 1e-6 and (outside or not clip):
        raise BadBox("box outside the image", where)
    limits = (width, height, width, height)
    x1, y1, x2, y2 = (min(max(value, 0.0), float(limit)) for value, limit in zip(item.box, limits, strict=True))
    _check_extent((x1, y1, x2, y2))
    return replace(item, box=(x1, y1, x2, y2))


def _excess(box: Box, width: int, height: int) -> float:
    """Return by how many pixels a box sticks out of the image."""
    x1, y1, x2, y2 = box
    return max(-x1, -y1, x2 - width, y2 - height)


def _check_extent(box: Box) -> None:
    x1, y1, x2, y2 = box
    if not all(map(math.isfinite, box)):
        raise BadBox("non-finite box", box)
    if x2 < x1 or y2 < y1:
        raise BadBox("inverted box", box)
    if x2 == x1 or y2 == y1:
        raise BadBox("zero-area box", box)


def parse_box(values: Any) -> Box:
    """Return four numbers, or raise `BadRecord`."""
    if not isinstance(values, list) or len(values) != 4:
        raise BadRecord("malformed box", f"{values!r} is not four numbers")
    first, second, third, fourth = values
    if type(first) is type(second) is type(third) is type(fourth) is float:  # as most are: in a fifth of the time
        return first, second, third, fourth
    first, second, third, fourth = (parse_number(value, "malformed box") for value in values)
    return first, second, third, fourth


def parse_number(value: Any, reason: str = "malformed record") -> float:
    """Return a number as float (also NaN and infinite), or raise `BadRecord` with `reason`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecord(reason, f"{value!r} is not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise BadRecord(reason, "a number beyond all floats") from error


def parse_optional(value: Any) -> float | None:
    """Return a finite number, also one written as text; None for anything else: it is as if it were not given."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def parse_size(width: Any, height: Any) -> tuple[float, float] | None:
    """Return the stated size of an image; None unless both numbers are given and above 0."""
    size = (parse_optional(width) or 0.0, parse_optional(height) or 0.0)
    return size if min(size) > 0 else None


def parse_text(value: Any, what: str) -> str:
    """Return text without the white space around it, or raise `BadRecord`."""
    if not isinstance(value, str):
        raise BadRecord("malformed record", f"{what} is {value!r}, not text")
    return value.strip()


def parse_dict(value: Any, what: str) -> dict[str, Any]:
    """Return a JSON object, or raise `BadRecord`."""
    if not isinstance(value, dict):
        raise BadRecord("malformed record", f"{what} is {value!r}, not a JSON object")
    return value
