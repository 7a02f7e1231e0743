"""Chats of several images: which image a box is of, and the record of them all."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from convert.chats import message_parts
from convert.items import BadRecord
from convert.records import Record
from recipe.schema import Box, Message, Object


def image_parts(messages: Sequence[Message]) -> int:
    """Return how many places of images a chat has."""
    return sum(part["type"] == "image" for message in messages for part in message_parts(message))


def owners_of_turns(messages: Sequence[Message], num_images: int) -> list[int | None]:
    """Return the number of the image, from 0, that the boxes of each message are of if they do not say so.

    It is the only image of the last user turn with images. None: there are several, or none yet.
    """
    if num_images <= 1:
        return [0 for _ in messages]
    owners, num_shown, last = list[int | None](), 0, None
    for message in messages:
        number = image_parts([message])
        if number:
            last = num_shown if number == 1 else None
        num_shown += number
        owners.append(last)
    return owners


def parse_owners(value: Any, num_images: int) -> list[int] | None:
    """Return the number of the image, from 0, of each of `objects`; None if there is one image, or none is stated.

    A list states it as `image` of each object, parallel lists as `image_id`.

    Raises:
        BadRecord: It is stated for some only, or is not the number of an image.
    """
    if num_images <= 1 or not value:
        return None
    stated = [row.get("image") for row in value] if isinstance(value, list) else value.get("image_id") or []
    if isinstance(stated, list) and all(number is None for number in stated):
        return None
    known, size = range(num_images), len(value if isinstance(value, list) else value.get("bbox") or ())
    if not isinstance(stated, list) or len(stated) != size:
        raise BadRecord("unequal lengths", f"objects has the image_id {stated!r} for {size} bbox")
    if any(type(number) is not int or number not in known for number in stated):
        raise BadRecord("malformed record", f"objects are of the images {stated}: number each from 0 to {known[-1]}")
    return stated


def box_part(box: Box, owner: int, num_images: int) -> dict[str, Any]:
    """Return the part of a message for a box; it names its image if there are several."""
    return {"type": "box", "box": box} | ({"image": owner} if num_images > 1 else {})


def make_record(
    images: Sequence[str],
    objects: Sequence[Object] | None,
    owners: Sequence[int],
    empty: Collection[int] = (),
    **fields: Any,
) -> Record:
    """Return the record of any number of images, each with the objects that it owns.

    Of several, those without objects are not annotated, except `empty` ones, which are known to hold nothing. `fields`
    are those of `Record`; `bbox_type` is that of all images.
    """
    if len(images) <= 1:
        return Record(images[0] if images else None, objects, **fields)
    parts: list[Record] = []
    for number, image in enumerate(images):
        places = [place for place, owner in enumerate(owners) if owner == number]
        own = [objects[place] for place in places] if objects is not None and places else None
        labels = [f"object {place + 1}" for place in places]
        own = [] if own is None and number in empty else own
        parts.append(Record(image, own, bbox_type=fields.get("bbox_type"), labels=labels))
    first, *further = parts
    return replace(first, **fields, further=tuple(further))
