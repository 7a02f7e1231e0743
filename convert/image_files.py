"""The image files that records name: where they are, and whether they can be decoded."""

import os
import re
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path

from convert import remote, store
from convert.items import BadRecord
from recipe.images import MAX_ASPECT_RATIO, check_image


def find_image(root: str, name: str, follow_links: bool = False) -> str:
    """Return the real path of the file `name` under `root`; `name` may be absolute, or have Windows' backslashes.

    Raises:
        BadRecord: It is not below `root` (links followed, unless `follow_links`), or is not a file.
    """
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise BadRecord("text beyond Unicode", repr(name)) from error
    if "\0" in name:
        raise BadRecord("missing file", repr(name))
    if not root:
        raise BadRecord("missing file", f"{name!r}: give the folder of the images with --images")
    if store.is_remote(root):
        return remote.address_of(root, name)
    if "\\" in name and not os.path.isfile(os.path.join(root, name)):
        if re.match(r"[A-Za-z]:|\\\\", name):
            raise BadRecord("absolute path", f"{name!r} is a path on another machine: write it relative to --images")
        name = name.replace("\\", "/")
    (plain_root, real_root), path = _forms_of(root), os.path.join(root, name)
    if not any(_is_below(os.path.normpath(path), folder) for folder in (plain_root, real_root)):
        if os.path.isabs(name):
            raise BadRecord("absolute path", f"{name!r} is not below --images: write it relative to that folder")
        raise BadRecord("path leaves the image root", repr(name))
    target = os.path.realpath(path)
    if not (follow_links or _is_below(target, real_root)):
        raise BadRecord("is a link to outside --images", f"{name!r}: give --follow-links to read what it names")
    if not os.path.isfile(target):
        lost = f", a link to {target!r}, which is not there" if os.path.islink(path) else ""
        place = next((place for place in _places_near(root) if os.path.isfile(os.path.join(place, name))), None)
        hint = "" if place is None else f"; --images {place} has it"
        raise BadRecord("missing file", f"{path!r}{lost}{hint}")
    return target


@cache
def _forms_of(root: str) -> tuple[str, str]:
    """Return the path of an image folder without dots, and its real path; asked for each of millions of images."""
    return os.path.normpath(root), os.path.realpath(root)


@cache
def _places_near(root: str) -> list[str]:
    """Return the folder above and the first folders below an image folder, which may have been meant."""
    below: list[str] = []
    with suppress(OSError), os.scandir(root) as entries:
        below = sorted(entry.path for entry in islice(entries, 1000) if os.path.isdir(entry.path))
    return [os.path.dirname(os.path.abspath(root)), *below[:20]]


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([folder, path]) == folder


def name_of_url(url: str, root: Path) -> str:
    """Return the file of an address under `root`: its last two parts, or the last alone if only that is there."""
    parts = url.strip().split("/")
    name = "/".join(parts[-2:])
    return parts[-1] if not (root / name).is_file() and (root / parts[-1]).is_file() else name


def read_image(path: str) -> tuple[bytes, int, int]:
    """Return the file's bytes, and the width and height of the image as displayed (EXIF orientation applied)."""
    data = read_bytes(path)
    return data, *check_content(data, os.path.basename(path))


def stamp(path: str) -> object:
    """Return what changes with a file; of one in a store its address, since to ask costs a request per image."""
    return path if store.is_remote(path) else (os.stat(path).st_size, os.stat(path).st_mtime_ns)


def read_bytes(path: str) -> bytes:
    """Return the bytes of a file, local or in a store; BadRecord if it cannot be read."""
    if store.is_remote(path):
        return remote.read_bytes(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadRecord("unreadable image", f"{os.path.basename(path)}: {error}") from error


def check_content(data: bytes, name: str) -> tuple[int, int]:
    """Return the width and height of an image's bytes, as `read_image`."""
    try:
        width, height = check_image(data)
    except (OSError, ValueError) as error:
        raise BadRecord("unreadable image", f"{name}: {error}") from error
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        detail = f"{name} is {width}x{height}: crop or tile it"
        raise BadRecord(f"image over {MAX_ASPECT_RATIO} times as long as wide", detail)
    return width, height
