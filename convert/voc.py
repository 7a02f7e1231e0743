"""Pascal VOC xml → MDS.

    python -m convert.voc --annotations DIR --images DIR --out OUT --split train

VOC counts pixels from 1 and includes the last one, so its box (xmin, ymin, xmax, ymax) is the xyxy box
(xmin - 1, ymin - 1, xmax, ymax) here. The caption is the object's `name`. Objects marked `difficult` or `truncated`
are kept like any other; the boxes of `part`s of an object are not read. The id of a sample is the xml file's path under
the annotation folder, without suffix. If `filename` names no image, the image with the xml file's own name is taken.
"""

import codecs
import os
import re
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from posixpath import basename, dirname, join, normpath, splitext
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from convert.formats import describe_other
from convert.items import BadRecord, Found, Note
from convert.records import Record, list_records, parse_size
from convert.write import add_box_options, box_options, build_parser, run
from recipe.images import SUFFIXES
from recipe.schema import Object

_DECLARATION = re.compile(rb"""^(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?\bencoding\s*=\s*["']([\w.-]+)["'][^>]*\?>""")
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}  # what people really use


def find(annotations: Path, images: Path, **boxes: Any) -> Found:
    """Return one record per xml file under `annotations`, by path. Hidden files are skipped and counted.

    Every xml file is read here, because two of them may be about one image. For `boxes` see `list_records`.

    Raises:
        ValueError: `annotations` holds no xml file, or `images` is not a folder.
    """
    if annotations.is_file():
        raise ValueError(describe_other(annotations, "a folder of Pascal VOC .xml files"))
    if not annotations.is_dir():
        raise ValueError(f"annotation folder {annotations} does not exist: give a folder of Pascal VOC .xml files")
    shift = 1.0 if boxes.get("bbox_type") in (None, "real") else 0.0
    finder = _ImageFinder(images)
    names: list[str] = []
    hidden: list[str] = []
    for path in sorted(annotations.rglob("*.xml")):
        name = path.relative_to(annotations).as_posix()
        (hidden if any(part.startswith(".") for part in name.split("/")) else names).append(name)
    if not names:
        raise ValueError(f"no .xml file under the annotation folder {annotations}: give one of Pascal VOC files")
    results: dict[str, Record | BadRecord] = {}
    owners: dict[str, list[str]] = defaultdict(list)
    for name in names:
        try:
            record = _parse(annotations / name, name, finder, shift)
            if os.path.isfile(images / (record.image or "")):
                owners[normpath(record.image or "")].append(name)
        except BadRecord as error:
            record = error
        results[name] = record
    for shared in (shared for shared in owners.values() if len(shared) > 1):
        _settle(shared, results)
    leading = [Note("hidden files skipped", len(hidden), tuple(hidden))] if hidden else []
    rows = [(splitext(name)[0], name, partial(_give, results[name])) for name in names]
    return Found(list_records(images, rows, **boxes), leading)


def _give(result: Record | BadRecord) -> Record:
    if isinstance(result, BadRecord):
        raise result
    return result


def _settle(shared: list[str], results: dict[str, Record | BadRecord]) -> None:
    """Keep the first of the xml files of one image if all say the same, else refuse all of them."""
    records = [result for name in shared if isinstance(result := results[name], Record)]
    same = all((record.objects, record.size) == (records[0].objects, records[0].size) for record in records)
    for name in shared[same:]:
        others = ", ".join(other for other in shared if other != name)
        remedy = f"{shared[0]} is kept" if same else "keep one of them"
        results[name] = BadRecord("duplicate image", f"{records[0].image} is also that of {others}: {remedy}")


class _ImageFinder:
    """Finds the image that an xml file is about, though its `filename` may be stale, shortened or from another machine.

    Attributes:
        root: Folder of the images.
        list_stems: Names of the images in a folder under `root`, by name without suffix.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.list_stems: Callable[[str], dict[str, list[str]]] = cache(self._list_stems)

    def find(self, filename: str, folder: str, xml: str) -> tuple[str, bool]:
        """Return the image's path under `root`, and if it was found by the xml file's own name alone.

        Args:
            filename: As the xml file says, perhaps empty.
            folder: The image's folder as the xml file says, perhaps empty.
            xml: The xml file's path under the annotation folder.

        Raises:
            BadRecord: No image has either name, or one has each.
        """
        stem, places = splitext(basename(xml))[0], [place for place in (dirname(xml), folder) if place] + [""]
        stated, own = self._find_stated(filename, places), self._find_stem(stem, places)
        if stated is not None:
            if own and splitext(basename(stated))[0] != stem:
                text = f"<filename> says {stated}, but {own} has the xml file's own name"
                raise BadRecord("ambiguous image", f"{text}: correct <filename> or rename the xml file")
            return stated, False
        if own is not None:
            return own, True
        if not filename:
            raise BadRecord("missing file", f"no <filename>, and no image is called {stem!r}")
        return filename, False  # the record is rejected with what is wrong with it

    def _find_stated(self, filename: str, places: list[str]) -> str | None:
        """Return the image that `filename` names: its path, then shorter ends of it, then without its suffix."""
        if not filename or "\0" in filename:
            return None
        parts = filename.replace("\\", "/").split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts)) if ".." not in parts[start:]]
        for name in [filename, *ends] if ".." not in parts else ends:
            for path in (join(place, name) for place in places if not name.startswith("/")):
                if os.path.isfile(self.root / path):
                    return path
        return self._find_stem(parts[-1], places) or self._find_stem(splitext(parts[-1])[0], places)

    def _find_stem(self, stem: str, places: list[str]) -> str | None:
        """Return the image called `stem` and a suffix, of the first of `places` that has one."""
        for place in places:
            found = self.list_stems(place).get(stem, [])
            if len(found) > 1:
                raise BadRecord("ambiguous image", f"{' and '.join(found)}: write which one into <filename>")
            if found:
                return found[0]
        return None

    def _list_stems(self, folder: str) -> dict[str, list[str]]:
        stems: dict[str, list[str]] = defaultdict(list)
        place = self.root / folder
        for name in sorted(os.listdir(place)) if place.is_dir() else ():
            stem, suffix = splitext(name)
            if suffix.lower() in SUFFIXES:
                stems[stem].append(join(folder, name))
        return stems


def _parse(path: Path, name: str, finder: _ImageFinder, shift: float) -> Record:
    root = _parse_xml(path)
    filename = (root.findtext("filename") or "").strip()
    folder = (root.findtext("folder") or "").strip().replace("\\", "/").rstrip("/")
    image, by_own_name = finder.find(filename, basename(folder).replace("..", ""), name)
    objects = []
    for number, item in enumerate(root.findall("object"), start=1):
        try:
            objects.append(_parse_object(item, shift))
        except BadRecord as error:
            raise BadRecord(error.reason, f"object {number}: {error.detail}") from error
    note = Note("images found by the name of their xml file, not by <filename>", 1, (name,))
    size = parse_size(root.findtext("size/width"), root.findtext("size/height"))
    return Record(image, objects, size, notes=(note,) * by_own_name)


def _parse_xml(path: Path) -> Element:
    """Return the root of an xml file, also in an encoding of several bytes per letter, which expat does not read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadRecord("malformed xml", error) from error
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        failure = error
    declared = _DECLARATION.match(data)
    if declared is not None:
        encoding = declared.group(1).decode()
        for codec in (encoding, "utf-8"):
            try:
                codec = codecs.lookup(codec).name
                codec = _SUPERSETS.get(codec, codec)
                return ElementTree.fromstring(data[declared.end() :].decode(codec))
            except (ElementTree.ParseError, ValueError, LookupError):
                continue
    is_text = data.decode(errors="ignore").encode() == data
    raise BadRecord("malformed xml", failure if is_text else f"{failure}: save the file as UTF-8") from failure


def _parse_object(item: Element, shift: float) -> Object:
    xmin, ymin, xmax, ymax = (_number(item, f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax"))
    return Object((xmin - shift, ymin - shift, xmax, ymax), (item.findtext("name") or "").strip())


def _number(element: Element, name: str) -> float:
    text = (element.findtext(name) or "").strip()
    if not text:
        raise BadRecord("malformed record", f"no <{name}>")
    try:
        return float(text)
    except ValueError as error:
        raise BadRecord("malformed record", f"<{name}> is {text!r}, not a number") from error


def main() -> None:
    """Run the command line."""
    parser = build_parser("voc", __doc__)
    parser.add_argument("--annotations", type=Path, required=True, metavar="DIR", help="folder of xml files")
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the images, laid out like the xml files or flat",
    )
    add_box_options(parser)
    run(parser, lambda args: find(args.annotations, args.images, **box_options(args)))


if __name__ == "__main__":
    main()
