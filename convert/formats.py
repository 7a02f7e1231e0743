"""What a file looks like that a converter cannot read: one sentence, with what reads it."""

import codecs
import re
from pathlib import Path

from convert.__main__ import COMMANDS

_HEAD, _TAIL = 2**20, 2**16  # bytes that are looked at: large files list their keys late
_TOOLS = ("shapes", "teachers", "verify")  # of `COMMANDS`, they read no annotations
_KEY = re.compile(r'"(\w+)"\s*:')
_NUMBERS = re.compile(r"\d+(\s+-?[\d.]+(e-?\d+)?){4,}\s*", re.IGNORECASE)

# Keys that a JSON file has → (what it looks like, the converter that reads it). The first line that fits applies.
_JSON = (
    ({"conversations"}, "a chat", "chat"),
    ({"messages"}, "a chat", "chat"),
    ({"query", "response"}, "a chat", "chat"),
    ({"instruction", "output"}, "a chat", "chat"),
    ({"filename", "detection"}, "ODVG", "odvg"),
    ({"filename", "grounding"}, "ODVG", "odvg"),
    ({"images", "objects"}, "JSON lines of this recipe", "jsonl"),
    ({"not_exhaustive_category_ids"}, "LVIS", "lvis"),
    ({"ref_id", "sentences"}, "RefCOCO", "refcoco"),
    ({"images", "annotations"}, "COCO instances", "coco"),
    ({"regions", "region_id"}, "Visual Genome", "visual_genome"),
    ({"objects", "synsets"}, "Visual Genome", "visual_genome"),
    ({"imagePath", "shapes"}, "LabelMe's JSON", ""),
    ({"region_attributes"}, "VIA's JSON", ""),
    ({"annotations", "result"}, "Label Studio's own JSON (it exports COCO and YOLO too)", ""),
    ({"image_id", "category_id", "score"}, "COCO results, which are predictions", ""),
)
_UNKNOWN = ("JSON with the keys", "plain text", "a binary file", "an empty file")
_BINARY = (
    (b"PAR1", "parquet", "parquet"),
    (b"PK\x03\x04", "a zip file: unpack it", ""),
    (b"\x1f\x8b", "a gzip file: unpack it", ""),
    (b"\x80", "a pickle", "refcoco"),
)


def starts_as_json(path: Path) -> bool:
    """Return whether the first letter of a file begins a JSON object or array."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[")


def look_at(path: Path) -> tuple[str, str]:
    """Return what a file looks like, and the name of the converter that reads it, empty if none does."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(max(len(head), path.stat().st_size - _TAIL))
        tail = file.read()
    for mark, what, reader in _BINARY:
        if head.startswith(mark):
            return what, reader
    if b"\0" in head:
        return "a binary file", ""
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text[:1] in ("{", "["):
        keys = list(dict.fromkeys(_KEY.findall(text + tail.decode(errors="replace"))))
        for wanted, what, reader in _JSON:
            if wanted <= set(keys):
                return what, reader
        return f"JSON with the keys {', '.join(keys[:6]) or '(none)'}", ""
    return _look_at_text(text)


def _look_at_text(text: str) -> tuple[str, str]:
    lines = text.splitlines()[:200]
    if text.startswith("<"):
        if "<annotation>" in text:
            return "one file of Pascal VOC, of which the folder is given", "voc"
        return "CVAT's XML (it exports COCO and YOLO too)" if "<annotations>" in text else "XML", ""
    if any(re.match(r"(names|nc|train|val)\s*[:=]", line) for line in lines):
        return "YOLO's description of a data set", "yolo"
    if lines and all(_NUMBERS.fullmatch(line) for line in lines[:3]):
        return "YOLO labels, of which data.yaml or the folder of classes.txt is given", "yolo"
    if lines and max(lines[0].count(mark) for mark in ",;\t") >= 2:
        return "a CSV table", ""
    return "plain text" if lines else "an empty file", ""


def refuse_other(path: Path, wanted: str, *readers: str) -> None:
    """Raise ValueError if a file looks like one that none of `readers` reads; not if it looks like nothing known."""
    what, reader = look_at(path)
    if reader not in (*readers, "") or not (reader or what.startswith(_UNKNOWN)):
        raise ValueError(describe_other(path, wanted))


def describe_other(path: Path, wanted: str) -> str:
    """Return one sentence that `path` is not `wanted`: what it looks like, and what reads it or which formats are read.

    `wanted` follows "not", as in "a COCO file".
    """
    what, reader = look_at(path)
    if reader in COMMANDS:
        return f"{path} looks like {what}, not {wanted}: read it with python -m convert.{reader}"
    formats = ", ".join(name for name in COMMANDS if name not in _TOOLS)
    return (
        f"{path} looks like {what}, not {wanted}: make it one of the formats that python -m convert lists ({formats})"
    )
