"""Where a YOLO data set keeps its class names, the images of a part and their labels, as Ultralytics finds them."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from convert.formats import describe_other
from recipe.images import SUFFIXES

_DESCRIPTIONS = ("data.yaml", "data.yml", "dataset.yaml", "obj.data")
_NAME_LISTS = ("classes.txt", "obj.names")
_PARTS = (("train",), ("val", "valid", "validation"), ("test",))  # and their other names
_WANTED = "a data.yaml with names, an obj.data, or a folder with one of them or with classes.txt"


@dataclass(frozen=True)
class Layout:
    """What a description says.

    Attributes:
        source: The description itself.
        names: Of the classes, by index.
        bases: Folders that its paths may be relative to, absolute; the first that has a path is right.
        parts: Folders or files of image paths, by part; empty for a folder with classes.txt.
        num_values: Numbers of a label line with keypoints, None if it has none.
    """

    source: Path
    names: Mapping[int, str]
    bases: list[Path]
    parts: Mapping[str, list[str]] = field(default_factory=dict)
    num_values: int | None = None

    def list_images(self, split: str) -> list[str]:
        """Return the absolute paths of a part's images, sorted; those that a file lists need not exist.

        Raises:
            ValueError: There is no such part, or its place does not exist.
        """
        places = self._choose(split) if self.parts else [_find_part(self.bases[0], split)]
        return sorted({path for place in places for path in self._list_place(place)})

    def _choose(self, split: str) -> list[str]:
        alias = _group_of(split)
        chosen = next((self.parts[name] for name in alias if name in self.parts), None)
        if chosen is None:
            shown = ", ".join(self.parts)
            raise ValueError(f"{self.source} has the parts {shown}: --split {split} must be one of them")
        return chosen

    def _list_place(self, place: str) -> Iterator[str]:
        found = next((path for path in _variants(place, self.bases) if os.path.exists(path)), None)
        if found is None:
            shown = " or ".join(dict.fromkeys(map(str, self.bases)))
            remedy = "give --images the folder that it is relative to"
            raise ValueError(f"{self.source} names {place}, which is not under {shown}: {remedy}")
        if os.path.isfile(found):
            for line in filter(str.strip, Path(found).read_text(encoding="utf-8-sig").splitlines()):
                paths = list(_variants(line, [Path(found).parent, *self.bases]))
                yield next((path for path in paths if os.path.isfile(path)), paths[0])
            return
        for folder, folders, files in os.walk(found, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            names = (name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith("."))
            yield from (os.path.join(folder, name) for name in names)


def read_layout(path: Path, images: Path | None = None) -> Layout:
    """Return what data.yaml, obj.data, or a folder with one of them or with classes.txt says.

    `images` is the folder that paths are relative to; default: the `path` of data.yaml if it exists, then the folder
    of the description.

    Raises:
        ValueError: It is not such a file, or its names are missing or not as many as it says.
    """
    if path.is_dir():
        listed = [path / name for name in (*_DESCRIPTIONS, *_NAME_LISTS) if (path / name).is_file()]
        if not listed:
            raise ValueError(f"{path} holds none of {', '.join((*_DESCRIPTIONS, *_NAME_LISTS))}: give {_WANTED}")
        path = listed[0]
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give {_WANTED}")
    folder = Path(os.path.abspath(path.parent))
    if path.name in _NAME_LISTS:
        names = {index: name.strip() for index, name in enumerate(_read(path).splitlines())}
        return Layout(path, names, [images.absolute() if images else folder])
    data = _read_data(path) if path.suffix == ".data" else _read_yaml(path)
    root = data.get("path") or "."
    bases = [images.absolute()] if images else [Path(os.path.abspath(base / root)) for base in (folder, Path.cwd())]
    shape = data.get("kpt_shape")
    return Layout(
        path,
        _read_names(data, path),
        [*bases, folder],
        {name: _as_list(data[name]) for group in _PARTS for name in group if data.get(name) not in _NOTHING},
        5 + int(shape[0]) * int(shape[1]) if shape else None,
    )


def find_label(image: str) -> str | None:
    """Return the label file of an image, None if it has none."""
    return next((path for path in label_paths(image) if os.path.isfile(path)), None)


def label_paths(image: str) -> list[str]:
    """Return where the label file of an image may be: in `labels` for the last `images` of its path, or next to it."""
    stem = os.path.splitext(image)[0] + ".txt"
    return ["/labels/".join(stem.rsplit("/images/", 1)), stem]


_NOTHING = (None, "", "null", "~", [])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: give {_WANTED}") from error


def _read_data(path: Path) -> dict[str, Any]:
    """Return darknet's lines of key = value, the names read from the file that they name."""
    pairs = (line.split("=", 1) for line in _read(path).splitlines() if "=" in line)
    data: dict[str, Any] = {key.strip(): value.strip() for key, value in pairs}
    listed = [file for file in _variants(data.get("names", ""), [path.parent]) if os.path.isfile(file)]
    return {**data, "nc": data.get("classes"), "names": _read(Path(listed[0])).split("\n") if listed else None}


def _read_yaml(path: Path) -> dict[str, Any]:
    """Return a mapping of texts: this loader makes nothing else, runs no code, and a class `no` stays "no"."""
    try:
        data = yaml.load(_read(path), yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())}): give {_WANTED}") from error
    if not isinstance(data, dict) or not data.keys() & {"names", "nc", "train", "val"}:
        raise ValueError(describe_other(path, _WANTED))
    return data


def _read_names(data: Mapping[str, Any], path: Path) -> dict[int, str]:
    found, count = data.get("names"), data.get("nc")
    if not isinstance(found, list | dict) or not found:
        raise ValueError(f"{path} has no names: write names: [first class, second class, ...]")
    try:
        pairs = found.items() if isinstance(found, dict) else enumerate(found)
        names = {int(index): name.strip() for index, name in pairs}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: names must be texts, in a list or by whole number from 0") from error
    names = {index: name for index, name in names.items() if name or index < len(names) - 1}  # an empty last line
    if count is not None and str(count) != str(len(names)):
        raise ValueError(f"{path} says that there are {count} classes, but names has {len(names)}: make them equal")
    return names


def _as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _group_of(split: str) -> tuple[str, ...]:
    return next((group for group in _PARTS if split in group), (split,))


def _find_part(folder: Path, split: str) -> str:
    """Return the place of a part in a folder without data.yaml; the whole folder if it is not divided."""
    for group in (_group_of(split), *_PARTS):
        for place in (text.format(name) for name in group for text in ("images/{}", "{}/images", "{}", "{}.txt")):
            if (folder / place).exists():
                if split not in group:
                    raise ValueError(f"{folder} has the part {place}, so --split {split} must name one of its parts")
                return place
    return "."


def _variants(place: str, bases: list[Path]) -> Iterator[str]:
    """Yield where a path may be: under each of `bases`, also without its first part (`../`, or darknet's `data/`)."""
    place = place.replace("\\", "/").strip()
    for base in bases:
        for name in (place, place.partition("/")[2]) if "/" in place.strip("/") else (place,):
            yield os.path.normpath(base / name)
