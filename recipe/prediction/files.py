"""The files of `predict.py`: images, data sets and solved examples in; predictions in our own form and as COCO out.

`predictions.json` is a list of one entry per image, each a `PredictedFile`:

    {"id": "a", "file": "images/a.jpg", "image_id": 1, "width": 640, "height": 480,
     "score_threshold": 0.3, "objects": [{"box": [x1, y1, x2, y2], "score": 0.93, "caption": "a cat"}, ...],
     "answer": "[...]", "answer_objects": [{"box": [...], "caption": "a cat"}, ...],
     "answer_is_cut": false, "error": null, "least_score": 0.05,
     "objects_below": [{"box": [...], "score": 0.12, "caption": ""}, ...]}

Boxes are xyxy in pixels of the displayed image. `objects` are all with at least `score_threshold`, by falling score;
both are null if the head was not asked. `objects_below` are no predictions: only the gallery's slider shows them. They
have less than the threshold, at least `least_score`, and no captions. With a class list, an object also has `classes`,
the probability of each likely one, and its caption is the first. `answer` is null if the language model was not
asked, `answer_objects` also if its answer could not be parsed. If an image could not be used, all but `error`, `id`,
`file` and `image_id` is null.
"""

import glob
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.annotated import jsonl_files, read_jsonl
from recipe.images import SUFFIXES
from recipe.metrics.gather import normalized_caption
from recipe.prediction.remote import RemoteImage, is_remote, list_images
from recipe.records import INDEX_FILE, write_whole
from recipe.schema import DetectedObject, ImageId, Prediction, Sample

PREDICTIONS_FILE = "predictions.json"
COCO_RESULTS_FILE = "coco_results.json"
NO_CATEGORY = -1  # in COCO results; pycocotools skips such a box unless useCats is 0
LEAST_SCORE = 0.05  # of objects below the threshold
AnyPath = Path | RemoteImage
_KEYS = {"id", "file", "width", "height", "objects", "answer", "answer_objects", "error"}


@dataclass(frozen=True)
class PredictedFile:
    """One entry of `predictions.json`: an image file and what was predicted for it.

    Attributes:
        id: Of the entry and its drawing; unique in the file.
        file: Path of the image, as given on the command line.
        image_id: In COCO results; None in files of older versions.
        prediction: Holds the objects with at least `score_threshold`; None if the image could not be used.
        score_threshold: None if the head did not run, and in files of older versions.
        error: Why the image could not be used.
        objects_below: Objects below the threshold, for the gallery's slider: no predictions, without captions. Holds
            those with at least `least_score`. Both are None if the head did not run, and in files of older versions.
    """

    id: str
    file: str
    image_id: ImageId | None
    prediction: Prediction | None
    score_threshold: float | None = None
    error: str | None = None
    least_score: float | None = None
    objects_below: tuple[DetectedObject, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads; if the image was not used, all but `error` and the names is null."""
        size, made = ("width", "height"), ("objects", "answer", "answer_objects", "answer_is_cut")
        known = dict.fromkeys((*size, *made)) if self.prediction is None else self.prediction.to_json()
        row = {"id": self.id, "file": self.file, "image_id": self.image_id, **{name: known[name] for name in size}}
        row["score_threshold"] = self.score_threshold
        row |= {**{name: known[name] for name in made}, "error": self.error}
        if self.objects_below is not None:
            row |= {"least_score": self.least_score, "objects_below": [item.to_json() for item in self.objects_below]}
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "PredictedFile":
        """Read what `to_json` wrote, also in a version without `score_threshold` or `objects_below`."""
        prediction = None if row["error"] is not None else Prediction.from_json(row)
        threshold, least, below = (row.get(name) for name in ("score_threshold", "least_score", "objects_below"))
        below = None if below is None else tuple(map(DetectedObject.from_json, below))
        return cls(row["id"], row["file"], row.get("image_id"), prediction, threshold, row["error"], least, below)


def find_images(arguments: Iterable[str], left_out: Path) -> tuple[list[AnyPath], Counter[str]]:
    """Return the images that arguments name, in order, each once, and counts of other files by suffix.

    An argument is a file, a folder, a glob or an address in an object store.

    A named file is always taken: if it does not exist, reading it reports that. A folder gives all files below it with
    an image suffix, by name, except hidden ones. `**` in a glob matches any folders.

    Args:
        arguments: Files, folders and globs.
        left_out: Folder that is not searched unless it is named itself, since the drawings go there.

    Raises:
        ValueError: A folder or a glob holds no image, or a folder cannot be read.
    """
    found: dict[AnyPath, AnyPath] = {}
    others = Counter[str]()
    for argument in arguments:
        if is_remote(argument):
            images, left = list_images(argument)
            others += left
            if not images:
                raise ValueError(f"{argument} holds no image: give an address of some with {' '.join(SUFFIXES)}")
            for image in images:
                found.setdefault(image, image)
            continue
        path = Path(argument)
        if path.is_dir():
            paths = list(_below(path, left_out.resolve(), others))
        elif path.exists() or not glob.has_magic(argument):
            paths = [path]
        else:
            named = map(Path, sorted(glob.glob(argument, recursive=True)))
            paths = [
                path for path in named if os.path.isfile(path) and left_out.resolve() not in path.resolve().parents
            ]
        if not paths:
            raise ValueError(f"{argument} holds no image: give files, globs, or folders of {' '.join(SUFFIXES)}")
        for path in paths:
            found.setdefault(path.resolve(), path)
    return list(found.values()), others


def _below(folder: Path, left_out: Path, others: Counter[str]) -> Iterator[Path]:
    """Yield the images below a folder, through links too, each folder once; count other files in `others`."""
    seen = {left_out} - {folder.resolve()}

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(Path(root).resolve())
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(root, name).resolve() not in seen
        )
        for name in sorted(name for name in names if not name.startswith(".")):
            if name.lower().endswith(SUFFIXES):
                yield Path(root, name)
            else:
                others[Path(name).suffix.lower()] += 1


def unique_names(paths: Sequence[AnyPath], out: Path) -> list[str]:
    """Return a name per image, its stem if free: no drawing `{out}/{name}.png` overwrites another or an input."""
    taken = {str(path.resolve()).casefold() for path in paths}
    names = []
    for path in paths:
        name, number = path.stem, 1
        while (drawing := str((out / f"{name}.png").resolve()).casefold()) in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(drawing)
        names.append(name)
    return names


def names_by_file(names: Iterable[str]) -> dict[str, list[str]]:
    """Return relative paths, as data sets write them, by their last part, which `entry_of` searches."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_on_this_system(name).name, []).append(name)
    return found


def entry_of(path: AnyPath, names: Mapping[str, Sequence[str]]) -> str | None:
    """Return the entry of `names` (from `names_by_file`) that names the file, or None; raise ValueError if several do.

    The folders of a name must be the last ones of the path, as given or with its links resolved: `train/x.png` does
    not name `val/x.png`.
    """
    places = [_on_this_system(str(place)).parts for place in (path.absolute(), path.resolve())]
    split = [(name, _on_this_system(name).parts) for name in names.get(places[0][-1], ())]
    alike = [name for name, parts in split if any(place[-len(parts) :] == parts for place in places)]
    if len(alike) > 1:
        raise ValueError(f"{path} can be any of {alike[:3]} of the data set: give files of different names")
    return alike[0] if alike else None


def _on_this_system(name: str) -> Path:
    return Path(name.replace("\\", "/"))  # data sets are written on Windows too


def entries_of(paths: Sequence[AnyPath], names: Iterable[str], source: str) -> list[str]:
    """Return the entry of each file in `names`, relative paths; raise ValueError if it has none, or shares it.

    `source` is where the names come from, for messages.
    """
    by_file = names_by_file(names)
    entries: list[str] = []
    for path in paths:
        name = entry_of(path, by_file)
        if name is None:
            raise ValueError(f"{path} is not among the images of {source}: leave one of them out")
        entries.append(name)
    refuse_shared(zip(map(str, paths), entries, strict=True))
    return entries


def refuse_shared(claims: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError if two files have the same entry of a data set; `claims`: (file, entry), repeated or not."""
    files: dict[str, str] = {}
    for file, name in claims:
        if files.setdefault(name, file) != file:
            raise ValueError(
                f"{files[name]} and {file} can both be {name} of the data set: predict the images of one folder at a "
                "time, or give a data set whose names have their folders"
            )


def read_annotated_folder(folder: Path) -> list[Sample]:
    """Return the annotated images of a folder: MDS shards, or one file of JSON lines and the images it names.

    Raises:
        ValueError: It is neither, or one of its images cannot be used or is not annotated.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one of MDS shards, or of images and their annotations")
    if (folder / INDEX_FILE).is_file():
        from recipe.upstream.storage import read_mds  # imports Composer, which takes seconds

        samples = list(read_mds(folder))
    else:
        files = jsonl_files(folder)
        if len(files) != 1:
            splits = sorted(str(index.parent) for index in folder.glob(f"*/{INDEX_FILE}"))
            form = "give a folder of MDS shards, or of images and their annotations as convert/jsonl.py reads them"
            remedy = f"give one of its splits, such as {splits[0]}" if splits else form
            raise ValueError(f"{folder} holds neither {INDEX_FILE} nor one file *.jsonl ({len(files)} found): {remedy}")
        samples = read_jsonl(files[0])
    if not samples:
        raise ValueError(f"{folder} holds no annotated image")
    unusable = [item.id for item in samples if item.objects is None or not item.image or item.further]
    if unusable:
        raise ValueError(f"{folder} holds samples that are not one annotated image: {unusable[:5]}")
    return samples


def rounded(prediction: Prediction, score_threshold: float, with_head: bool = True) -> Prediction:
    """Return a prediction as it is written: without objects below the threshold, or without the head's at all."""
    return replace(
        prediction,
        objects=_rounded(item for item in prediction.objects if with_head and item.score >= score_threshold),
        answer_objects=None if prediction.answer_objects is None else _rounded(prediction.answer_objects),
        with_head=with_head,
    )


def with_objects_below(entry: PredictedFile, found: Prediction, score_threshold: float) -> PredictedFile:
    """Add the objects of `found`, which holds all, from `LEAST_SCORE` up to the threshold."""
    below = (item for item in found.objects if LEAST_SCORE <= item.score < score_threshold)
    least = min(LEAST_SCORE, rounded_score(score_threshold))
    return replace(entry, least_score=least, objects_below=_rounded(below))


def _rounded(objects: Iterable[DetectedObject]) -> tuple[DetectedObject, ...]:
    boxes = ((item, [round(value, 2) for value in item.box]) for item in objects)  # hundredths of a pixel
    return tuple(
        DetectedObject(
            (x1, y1, x2, y2),
            rounded_score(item.score),
            item.caption,
            tuple((name, rounded_score(share)) for name, share in item.classes),
        )
        for item, (x1, y1, x2, y2) in boxes
    )


def rounded_score(score: float) -> float:
    """Return a score as it is written: six significant digits, so that small scores keep their order too."""
    return float(f"{score:.6g}")


def category_ids(categories: Iterable[tuple[str, ImageId]]) -> dict[str, ImageId]:
    """Return the id of each category by its name, in the form in which captions are compared.

    A name that two categories share in that form has `NO_CATEGORY`.
    """
    ids = defaultdict[str, set[ImageId]](set)
    for name, category_id in categories:
        ids[normalized_caption(name)].add(category_id)
    return {name: next(iter(found)) if len(found) == 1 else NO_CATEGORY for name, found in ids.items()}


def coco_results(
    entries: Iterable[PredictedFile], categories: Mapping[str, ImageId] | None = None
) -> list[dict[str, Any]]:
    """Return the head's objects as COCO results with their captions.

    If the head was not asked, the objects of the text answer, with score 1. An object with class probabilities gives a
    result per class, whose score is that of the object times the probability.

    Args:
        entries: What was predicted.
        categories: From `category_ids`: a box is of the category that is named like its caption, else of
            `NO_CATEGORY`. A single one is that of all boxes. None: all are of category 1.
    """
    known = {"": 1} if categories is None else categories
    otherwise = next(iter(known.values())) if len(known) == 1 else NO_CATEGORY
    results = []
    for entry in entries:
        if entry.prediction is None:
            continue
        for item in entry.prediction.objects if entry.prediction.with_head else entry.prediction.answer_objects or ():
            x1, y1, x2, y2 = item.box
            for one in item.per_class():
                results.append(
                    {
                        "image_id": entry.image_id,
                        "category_id": known.get(normalized_caption(one.caption), otherwise),
                        "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                        "score": rounded_score(one.score),
                        "caption": one.caption,
                    }
                )
    return results


def least_score(entries: Iterable[PredictedFile], below: bool = False) -> float:
    """Return the least score of which every entry holds its objects, or with `below` also those below the threshold.

    0 if a file of an older version does not say.
    """
    scores = (
        entry.least_score if below and entry.objects_below is not None else entry.score_threshold for entry in entries
    )
    return max((score or 0.0 for score in scores), default=0.0)


def refuse_to_overwrite(out: Path, names: Sequence[str]) -> None:
    """Raise ValueError if `out` holds a file that would be written."""
    files = [out / PREDICTIONS_FILE, out / COCO_RESULTS_FILE, *(out / f"{name}.png" for name in names)]
    there = [path.name for path in files if path.exists()]
    if there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        raise ValueError(f"{out} already holds {', '.join(there[:3])}{more}: give another --out, or --overwrite")


def write_entries(out: Path, entries: Sequence[PredictedFile], categories: Mapping[str, ImageId] | None = None) -> None:
    """Write both files; each appears whole. For `categories` see `coco_results`."""
    rows = [entry.to_json() for entry in entries]
    for name, value in ((PREDICTIONS_FILE, rows), (COCO_RESULTS_FILE, coco_results(entries, categories))):
        write_json_text(out / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_text(path: Path, text: str) -> None:
    """Write JSON, or a page that holds it: the file appears whole."""
    # Python reads a file name that is not UTF-8 as lone surrogates, which become JSON's escapes.
    write_whole(path, text.encode(errors="backslashreplace"))


def read_entries(path: Path) -> list[PredictedFile]:
    """Read a `predictions.json`, also of older versions; raise ValueError if an entry cannot be used."""
    try:
        rows = json.loads(path.read_bytes(), parse_constant=_refuse_number)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _KEYS for row in rows):
        raise ValueError(f"{path} is not a {PREDICTIONS_FILE} of recipe/predict.py: a list of {sorted(_KEYS)}")
    ids = set[str]()
    for row in rows:
        for name, value, kind in _fields(row):
            if not _IS[kind](value):
                raise ValueError(f"{path}: image {row['id']!r}: {name} is {value!r}, not {kind}: predict again")
        if row["id"] in ids:
            raise ValueError(f"{path}: several images have the id {row['id']!r}: predict them in one run")
        ids.add(row["id"])
    return [PredictedFile.from_json(row) for row in rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_IS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a number": _is_number,
    "four numbers": lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)),
    "a list": lambda value: isinstance(value, list),
    "an object": lambda value: isinstance(value, dict),
}


def _fields(row: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield the name and value of each field of an entry, and which check of `_IS` the value must pass."""
    yield "id", row["id"], "a text"
    yield "file", row["file"], "a text"
    if row["error"] is None:
        yield "width", row["width"], "a number"
        yield "height", row["height"], "a number"
    for name in ("score_threshold", "least_score"):
        if row.get(name) is not None:
            yield name, row[name], "a number"
    for name in ("objects", "answer_objects", "objects_below"):
        if row.get(name) is None:
            continue
        yield name, row[name], "a list"
        for index, item in enumerate(row[name]):
            where = f"{name}[{index}]"
            yield where, item, "an object"
            yield f"{where}.box", item.get("box"), "four numbers"
            yield f"{where}.caption", item.get("caption"), "a text"
            if name != "answer_objects":
                yield f"{where}.score", item.get("score"), "a number"


def _refuse_number(name: str) -> None:
    raise ValueError(f"a number in it is {name}")
