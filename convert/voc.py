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


def find_annotations(folder: Path) -> list[Path]:
    """Return the xml files under `folder`, sorted.

    Raises:
        ValueError: There is none.
    """
    if not folder.is_dir():
        raise ValueError(f"annotation folder {folder} does not exist: give a folder of Pascal VOC .xml files")
    paths = sorted(folder.rglob("*.xml"))
    if not paths:
        raise ValueError(f"no .xml file under the annotation folder {folder}: give one of Pascal VOC files")
    return paths


def find(annotations: Path, images: Path) -> Found:
    """Return one record per xml file, sorted by path.

    Args:
        annotations: Folder of xml files, searched in depth.
        images: Folder that `filename` is relative to.

    Raises:
        ValueError: `annotations` holds no xml file, or `images` is not a folder.
    """
    paths = find_annotations(annotations)
    names = [path.relative_to(annotations) for path in paths]
    rows = (
        (name.with_suffix("").as_posix(), name.as_posix(), partial(_parse, path))
        for name, path in zip(names, paths, strict=True)
    )
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
