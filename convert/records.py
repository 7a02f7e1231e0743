"""What makes a record good: the checks of every format on its way to a `Sample`."""

import io
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from convert.items import Item, Note, Rejected
from recipe.images import describe_decode_error, displayed_size, open_image
from recipe.schema import Box, Message, Object, Sample

ROUNDING = 1.0  # a box may stick out of the image by this many pixels: it is clipped and counted
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
BBOX_TYPES = {"real": None, "norm1": 1.0, "norm1000": 1000.0}  # what a box's numbers are parts of; real: pixels
BAD_BOXES = ("reject", "drop")
# VOC boxes lose 1 on the way, and fractions may stick out a little: no set of pixel boxes is within this.
_FRACTIONS_END = 1.5
ROLES = ("system", "user", "assistant")
IMAGE_PLACEHOLDER = "<image>"
CONTROL_TOKEN = re.compile(r"<\|\w+\|>")  # such as <|im_end|>: it would break a conversation apart
# What Pillow raises on broken files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadRecord(ValueError):
    """A record that must be left out, with its reason and the offending value."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = str(detail)


class BadBox(BadRecord):
    """A box that cannot be used; `--bad-boxes` says what that costs."""


@dataclass(frozen=True)
class Record:
    """What a format file says about one record, not yet checked against the image.

    Attributes:
        image: Path under the image root, or None for a text-only record.
        size: Stated (width, height) of the displayed image, or None.
        bbox_type: One of `BBOX_TYPES` if the record states it, else that of its file applies.
        labels: What messages call each object; default: object 1, object 2, ...
        notes: What was done to it while parsing.
    """

    image: str | None
    objects: Sequence[Object] | None
    size: tuple[float, float] | None = None
    messages: Sequence[Message] | None = None
    bbox_type: str | None = None
    labels: Sequence[str] = ()
    notes: tuple[Note, ...] = ()

    def label(self, position: int) -> str:
        """Return what messages call the object at `position`."""
        return self.labels[position] if self.labels else f"object {position + 1}"


Parse = Callable[[], Record]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A record of a format file, not yet parsed: an `Entry`.

    Attributes:
        image_root: Real path of the images' folder; nothing outside it is read.
        source: Its file and place in it, for the reader of rejected.jsonl.
        parse: Makes the record; may raise `BadRecord`.
        bbox_type: One of `BBOX_TYPES`, for records that state none.
        bad_boxes: One of `BAD_BOXES`: what a box that cannot be used costs.
    """

    image_root: str
    id: str
    source: str
    parse: Parse
    bbox_type: str = "real"
    bad_boxes: str = "reject"

    def fingerprint(self) -> str:
        """Return what the file says, and the size and time of the image it names."""
        try:
            record, file = self.parse(), None
            if record.image is not None:
                stat = os.stat(find_image(self.image_root, record.image))
                file = (stat.st_size, stat.st_mtime_ns)
        except BadRecord as error:
            return repr((self.id, self.source, str(error)))
        return repr((self.id, self.source, record, file, self.bbox_type, self.bad_boxes))

    def read(self) -> Iterator[Item]:
        """Yield the sample (after notes on what was done to it), or why it is rejected."""
        try:
            _check_text(self.id)
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
        _check_messages(messages or (), num_images=int(record.image is not None))
        if record.image is None:
            if messages is None:
                raise BadRecord("neither image nor messages")
            if record.objects:
                raise BadRecord("objects without an image", f"{len(record.objects)} objects")
            return Sample(self.id, b"", 0, 0, None, messages), []
        data, width, height = read_image(find_image(self.image_root, record.image))
        if record.size is not None and record.size != (width, height):
            stated = f"{record.size[0]:g}x{record.size[1]:g}"
            raise BadRecord("wrong size", f"stated {stated}, the displayed image is {width}x{height}")
        if record.objects is None:
            return Sample(self.id, data, width, height, None, messages), []
        objects, notes = self._check_objects(record, width, height)
        return Sample(self.id, data, width, height, objects, messages), notes

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
    image_root: Path, rows: Iterable[tuple[str, str, Parse]], bbox_type: str | None = None, bad_boxes: str = "reject"
) -> list[FileRecord]:
    """Return the records of a format file, in order; the first with an id owns it, later ones are rejected.

    `rows` are (id, source, parse) of each record; the id is empty if it has none. `bbox_type` and `bad_boxes` are the
    command line's.

    Raises:
        ValueError: `image_root` is not a folder, or `bbox_type` is None and all boxes are fractions.
    """
    if not image_root.is_dir():
        raise ValueError(f"image folder {image_root} does not exist")
    root, owned, records = os.path.realpath(image_root), set(), []
    for sample_id, source, parse in rows:
        if sample_id and sample_id in owned:
            parse = partial(_refuse_duplicate, sample_id)
        owned.add(sample_id)
        records.append(FileRecord(root, sample_id, source, parse, bbox_type or "real", bad_boxes))
    if bbox_type is None:
        refuse_fractions(records, "if they are fractions of the image, give --bbox-type norm1, else --bbox-type real")
    return records


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
        for item in record.objects or ():
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


def _refuse_duplicate(sample_id: str) -> Record:
    raise BadRecord("duplicate id", sample_id)


def find_image(root: str, name: str) -> str:
    """Return the real path of the file `name` under `root`.

    Raises:
        BadRecord: It is absolute, leaves `root` (links followed), or is not a file.
    """
    if "\0" in name:
        raise BadRecord("missing file", repr(name))
    if "\\" in name and not os.path.isfile(os.path.join(root, name)):
        name = name.replace("\\", "/")  # a path written on Windows
    path = os.path.realpath(os.path.join(root, name))
    if os.path.isabs(name) or os.path.commonpath([root, path]) != root:
        raise BadRecord("path leaves the image root", name)
    if not os.path.isfile(path):
        raise BadRecord("missing file", f"{os.path.join(root, name)!r}")
    return path


def read_image(path: str) -> tuple[bytes, int, int]:
    """Return the file's bytes, and the width and height of the image as displayed (EXIF orientation applied).

    Every byte is decoded, so no truncated file passes. The pixels of a JPEG are not needed: decoding it at an eighth of
    its size, in gray, takes half the time.

    Raises:
        BadRecord: It cannot be decoded.
    """
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.format != "JPEG":
                return data, *open_image(data).size
            image.draft("L", (1, 1))
            image.load()
        return data, *displayed_size(data)
    except _DECODE_ERRORS as error:
        raise BadRecord("unreadable image", f"{os.path.basename(path)}: {describe_decode_error(error)}") from error


def check_object(item: Object, width: int, height: int, clip: bool = False) -> Object:
    """Return the object, its box cut to the image if it sticks out by at most `ROUNDING` pixels, or if `clip`.

    Raises:
        BadBox: The box is not finite, inverted, of no area or outside the image.
        BadRecord: The caption is empty or holds a control token.
    """
    if not item.caption and not item.iscrowd:
        raise BadRecord("empty caption", f"box {item.box}")
    _check_text(item.caption)
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


def parse_messages(value: Any) -> list[Message] | None:
    """Return a chat of text or lists of text and image parts, None for none, or raise `BadRecord`."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise BadRecord("malformed messages", f"{value!r} is not a list of messages")
    for position, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadRecord("malformed messages", f"{message!r} lacks a role of {ROLES}")
        if message["role"] == "system" and position:
            raise BadRecord("malformed messages", "a system turn that is not the first")
        if not all(map(_is_part, message_parts(message))):
            raise BadRecord("malformed messages", f"the content of {message!r} is neither text nor parts")
    if not any(message["role"] == "user" for message in value):
        raise BadRecord("malformed messages", "no user turn")
    return value


def message_parts(message: Message) -> list[Any]:
    """Return the content of a message as a list of parts; `<image>` in a user's plain text is an image part."""
    content = message.get("content")
    if not isinstance(content, str):
        return content if isinstance(content, list) else [content]
    texts = content.split(IMAGE_PLACEHOLDER) if message["role"] == "user" else [content]
    parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})]
    return parts[1:]


def _is_part(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind == "image" or (kind == "text" and isinstance(part.get("text"), str))


def _check_messages(messages: Sequence[Message], num_images: int) -> None:
    """Refuse what training would refuse: control tokens, and placeholders for more images than there are."""
    parts = [part for message in messages for part in message_parts(message)]
    for part in parts:
        _check_text(part.get("text", ""))
    found = sum(part["type"] == "image" for part in parts)
    if found > num_images:
        raise BadRecord("malformed messages", f"{found} image placeholders and {num_images} images")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("text beyond Unicode", repr(text)) from error
    token = CONTROL_TOKEN.search(text)
    if token is not None:
        raise BadRecord("control token in a text", token.group())
