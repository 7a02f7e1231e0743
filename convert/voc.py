"""Pascal VOC xml → MDS.

    python -m convert.voc --annotations DIR --images DIR --out OUT --split train

VOC counts pixels from 1 and includes the last one, so its box (xmin, ymin, xmax, ymax) is the xyxy box
(xmin - 1, ymin - 1, xmax, ymax) here. The caption is the object's `name`. Objects marked `difficult` or `truncated`
are kept like any other; the boxes of `part`s of an object are not read. The id of a sample is the xml file's path under
the annotation folder, without suffix.
"""

from functools import partial
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from convert.items import Found
from convert.records import BadRecord, Record, list_records
from convert.write import build_parser, run
from recipe.schema import Object


def find(annotations: Path, images: Path) -> Found:
    """Return one record per xml file under `annotations`, by path; `filename` is relative to the folder `images`.

    Raises:
        ValueError: `annotations` holds no xml file, or `images` is not a folder.
    """
    if not annotations.is_dir():
        raise ValueError(f"annotation folder {annotations} does not exist: give a folder of Pascal VOC .xml files")
    rows = []
    for path in sorted(annotations.rglob("*.xml")):
        name = path.relative_to(annotations)
        rows.append((name.with_suffix("").as_posix(), name.as_posix(), partial(_parse, path)))
    if not rows:
        raise ValueError(f"no .xml file under the annotation folder {annotations}: give one of Pascal VOC files")
    return Found(list_records(images, rows))


def _parse(path: Path) -> Record:
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        raise BadRecord("malformed xml", error) from error
    size = None
    if root.find("size") is not None:
        size = (_number(root, "size/width"), _number(root, "size/height"))
    return Record(_text(root, "filename"), [_parse_object(item) for item in root.findall("object")], size)


def _parse_object(item: Element) -> Object:
    xmin, ymin, xmax, ymax = (_number(item, f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax"))
    return Object((xmin - 1, ymin - 1, xmax, ymax), (item.findtext("name") or "").strip())


def _text(element: Element, name: str) -> str:
    text = (element.findtext(name) or "").strip()
    if not text:
        raise BadRecord("malformed record", f"no <{name}>")
    return text


def _number(element: Element, name: str) -> float:
    text = _text(element, name)
    try:
        return float(text)
    except ValueError as error:
        raise BadRecord("malformed record", f"<{name}> is {text!r}, not a number") from error


def main() -> None:
    """Run the command line."""
    parser = build_parser("voc", __doc__)
    parser.add_argument("--annotations", type=Path, required=True, metavar="DIR", help="folder of xml files")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder of the images: <filename> is relative to it"
    )
    run(parser, lambda args: find(args.annotations, args.images))


if __name__ == "__main__":
    main()
