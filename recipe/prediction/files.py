"""What `predict.py` writes and `gallery.py` reads: predictions in our form, and as COCO results.

`predictions.json`, a list of one entry a picture:

    {"id": "a", "file": "pictures/a.jpg", "image_id": 1, "width": 640, "height": 480,
     "score_threshold": 0.3, "objects": [{"box": [x1, y1, x2, y2], "score": 0.93, "caption": "a cat"}, ...],
     "answer": "[...]", "answer_objects": [{"box": [...], "caption": "a cat"}, ...],
     "answer_is_cut": false, "error": null}

Boxes are xyxy in pixels of the displayed picture. `objects`, by falling score, are all from `score_threshold` up; both
are null where the head was not asked, `answer` where the language model was not, `answer_objects` also where its answer
could not be parsed. `answer_is_cut`: it was longer than allowed, and what would come after is not known. Of a picture
that could not be used everything but `error`, its name and its number is null.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.records import write_whole
from recipe.schema import DetectedObject, Prediction

PREDICTIONS_FILE = "predictions.json"
COCO_RESULTS_FILE = "coco_results.json"
_KEYS = {"id", "file", "width", "height", "objects", "answer", "answer_objects", "error"}

ImageId = int | str


def prediction_row(
    path: Path, image_id: ImageId, prediction: Prediction, score_threshold: float, with_head: bool = True
) -> dict[str, Any]:
    """The entry of a picture: objects by falling score, none below the threshold; null without the head."""
    objects = [_object_row(item, True) for item in prediction.objects if item.score >= score_threshold]
    answer = prediction.answer_objects
    return {
        "id": prediction.id,
        "file": str(path),
        "image_id": image_id,
        "width": prediction.width,
        "height": prediction.height,
        "score_threshold": rounded_score(score_threshold) if with_head else None,
        "objects": objects if with_head else None,
        "answer": prediction.answer,
        "answer_objects": None if answer is None else [_object_row(item, False) for item in answer],
        "answer_is_cut": prediction.answer_is_cut,
        "error": None,
    }


def failed_row(name: str, path: Path, image_id: ImageId, error: ValueError) -> dict[str, Any]:
    """The entry of a picture of which nothing is known."""
    names = ("width", "height", "score_threshold", "objects", "answer", "answer_objects", "answer_is_cut")
    unknown = dict.fromkeys(names)
    return {"id": name, "file": str(path), "image_id": image_id, **unknown, "error": str(error)}


def coco_results(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries as COCO results, all of category 1, with the caption beside them.

    The head's objects, or those of the text answer (score 1) where the head was not asked.
    """
    results = []
    for row in rows:
        for item in row["answer_objects"] or () if row["objects"] is None else row["objects"]:
            x1, y1, x2, y2 = item["box"]
            results.append(
                {
                    "image_id": row["image_id"],
                    "category_id": 1,
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "score": item.get("score", 1.0),
                    "caption": item["caption"],
                }
            )
    return results


def least_score(rows: Iterable[Mapping[str, Any]]) -> float:
    """The score from which on every entry holds its objects; 0 for files that do not tell, which older ones do not."""
    return max((row.get("score_threshold") or 0.0 for row in rows), default=0.0)


def rounded_score(score: float) -> float:
    """As scores are written: six digits from the first that is not 0, so that small ones keep their order too."""
    return float(f"{score:.6g}")


def refuse_to_overwrite(out: Path, names: Sequence[str]) -> None:
    """Lets nothing that is there be lost.

    Raises:
        ValueError: `out` holds a file that would be written.
    """
    files = [out / PREDICTIONS_FILE, out / COCO_RESULTS_FILE, *(out / f"{name}.png" for name in names)]
    there = [path.name for path in files if path.exists()]
    if there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        raise ValueError(f"{out} already holds {', '.join(there[:3])}{more}: give another --out, or --overwrite")


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes both files; each appears whole."""
    for name, value in ((PREDICTIONS_FILE, rows), (COCO_RESULTS_FILE, coco_results(rows))):
        write_json_text(out / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_text(path: Path, text: str) -> None:
    """Writes JSON, or what holds it: a file that is there is a whole one.

    Of a file name that is not UTF-8 Python makes lone surrogates, which become JSON's escapes.
    """
    write_whole(path, text.encode(errors="backslashreplace"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads a `predictions.json`.

    Raises:
        ValueError: It is none, or an entry of it cannot be used.
    """
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
                raise ValueError(f"{path}: picture {row['id']!r}: {name} is {value!r}, not {kind}: predict anew")
        if row["id"] in ids:
            raise ValueError(f"{path}: several pictures are called {row['id']!r}: predict them in one run")
        ids.add(row["id"])
    return rows


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
    """The fields of an entry that are not null where they may be: name, value, and what of `_IS` that must be."""
    yield "id", row["id"], "a text"
    yield "file", row["file"], "a text"
    if row["error"] is None:
        yield "width", row["width"], "a number"
        yield "height", row["height"], "a number"
    if row.get("score_threshold") is not None:
        yield "score_threshold", row["score_threshold"], "a number"
    for name in ("objects", "answer_objects"):
        if row[name] is None:
            continue
        yield name, row[name], "a list"
        for index, item in enumerate(row[name]):
            where = f"{name}[{index}]"
            yield where, item, "an object"
            yield f"{where}.box", item.get("box"), "four numbers"
            yield f"{where}.caption", item.get("caption"), "a text"
            if name == "objects":
                yield f"{where}.score", item.get("score"), "a number"


def _refuse_number(name: str) -> None:
    raise ValueError(f"a number in it is {name}")


def _object_row(item: DetectedObject, with_score: bool) -> dict[str, Any]:
    score = {"score": rounded_score(item.score)} if with_score else {}
    return {"box": [round(value, 2) for value in item.box], **score, "caption": item.caption}
