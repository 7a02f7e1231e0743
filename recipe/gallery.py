"""Draw predictions next to the truth: `python -m recipe.gallery --predictions DIR/predictions.json --out PAGE.html`.

The truth is a COCO instances file (`--truth instances.json`) or a converted data set (`--data FOLDER --split val`). The
page is one file that any browser opens from disk: it holds small images and loads nothing else. Images with the most
missed and false boxes at the slider's threshold come first. The slider starts at the threshold of the predictions;
boxes below it have no captions. Boxes at the right place in other words are marked; "words count" makes them errors.
The totals, and the table of classes, are of all images, also of those that `--max-images` leaves out. A class that is
chosen shows its images alone, those with most errors about it first.
"""

import sys

from recipe.console import setup_logging
from recipe.prediction.options import GALLERY_THRESHOLD, parse_gallery

if __name__ == "__main__":
    setup_logging()
    parse_gallery(sys.argv[1:])  # before the imports below, which take seconds

import argparse
import base64
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from PIL import Image

from convert.annotated import read_coco
from recipe.images import open_image
from recipe.metrics.categories import NOTHING, report_categories
from recipe.metrics.gather import FALSE, IGNORED, found_truths, is_unsure, normalized_caption
from recipe.prediction.files import (
    PredictedFile,
    entry_of,
    least_score,
    names_by_file,
    read_entries,
    refuse_shared,
    rounded_score,
    write_json_text,
)
from recipe.schema import DetectedObject, Sample
from recipe.upstream.storage import read_mds

TEMPLATE = Path(__file__).with_name("gallery.html")
IOU = 0.5  # the least of a prediction at the right place
SOURCES = ("head", "text")  # of boxes
JPEG_QUALITY = 82

Page = Mapping[str, Any]  # or one of its images


def main(args: argparse.Namespace) -> int:
    """Write the page; return the number of predictions whose image or truth was not found.

    Raises:
        ValueError: A file cannot be read, belongs to other images, or would be overwritten.
    """
    check_out(args.out, args.overwrite)
    folder = args.predictions.parent
    entries = read_entries(args.predictions)
    for index, entry in enumerate(entries):  # an image is where predict.py was given it, or else relative to `folder`
        if not Path(entry.file).exists() and (folder / entry.file).exists():
            entries[index] = replace(entry, file=str(folder / entry.file))
    threshold = threshold_of(entries, args.score_threshold)
    if args.data is not None:
        truths = truths_of_mds(entries, read_mds(args.data, args.split))
    else:
        truths = {} if args.truth is None else truths_of_coco(entries, read_coco(args.truth))
    page = page_data(entries, truths, threshold, args.max_images, args.image_size)
    try:
        write_json_text(args.out, render(page))
    except OSError as error:
        raise ValueError(f"cannot write {args.out} ({error}): give another --out") from error
    print(f"{len(page['images'])} of {len(entries)} images: {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB)")
    return report(entries, truths, page, args.truth or args.data, folder)


def check_out(out: Path, overwrite: bool) -> None:
    """Make the page's folder; raise ValueError if the page would overwrite something or cannot be written."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder: give a file as --out, such as {out / 'gallery.html'}")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: give another --out, or --overwrite")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {out} ({error}): give another --out") from error


def threshold_of(entries: Sequence[PredictedFile], wanted: float | None) -> float:
    """Return the slider's first value; raise ValueError if the entries lack objects of that score."""
    if wanted is None:
        return max(GALLERY_THRESHOLD, least_score(entries))
    least = least_score(entries, below=True)
    if rounded_score(wanted) < least:
        raise ValueError(
            f"--score-threshold {wanted}: the predictions hold only scores from {least}; give at least that, or "
            f"predict again with --score-threshold {wanted}"
        )
    return rounded_score(wanted)


def report(
    entries: Sequence[PredictedFile], truths: Mapping[str, Sample], page: Page, truth: Path | None, folder: Path
) -> int:
    """Print what is missing from the page; return the number of images concerned."""
    without_truth = [entry.file for entry in entries if truth is not None and entry.id not in truths]
    unseen = {item["id"] for item in page["images"] if not item["thumbnail"] and item["error"] is None}
    without_image = [entry.file for entry in entries if entry.id in unseen]
    absent = f"not in {truth} (folders count if its names have them)"
    unread = f"the image cannot be read, neither from {Path.cwd()} nor from {folder.resolve()}"
    unread += ": run this command in the folder where predict.py ran"
    for files, what in ((without_truth, absent), (without_image, unread)):
        if files:
            print(f"{len(files)} images: {what}: {', '.join(files[:5])}", file=sys.stderr)
    return len(without_truth) + len(without_image)


def truths_of_coco(entries: Sequence[PredictedFile], samples: Mapping[str, Sample]) -> dict[str, Sample]:
    """Return the truth of each prediction by its id, from samples by `file_name`.

    Raises:
        ValueError: Samples and images do not match one to one, or their sizes differ.
    """
    names = names_by_file(samples)
    found = {entry.id: entry_of(Path(entry.file), names) for entry in entries}
    claims = {entry_id: name for entry_id, name in found.items() if name is not None}
    refuse_shared((entry.file, claims[entry.id]) for entry in entries if entry.id in claims)
    return _checked(entries, {entry_id: samples[name] for entry_id, name in claims.items()})


def truths_of_mds(entries: Sequence[PredictedFile], samples: Iterable[Sample]) -> dict[str, Sample]:
    """Return the truth of each prediction by its id: the sample of the same bytes, else the one named like its file.

    A name counts only if no prediction has the sample's bytes. An image that was predicted twice has its truth twice.

    Raises:
        ValueError: Several images are named like one sample, or sizes differ.
    """
    by_bytes, by_name = defaultdict[bytes, list[str]](list), defaultdict[str, list[str]](list)
    for entry in entries:
        by_name[Path(entry.file).stem].append(entry.id)
        if data := _read(entry.file):
            by_bytes[hashlib.blake2b(data).digest()].append(entry.id)
    same: dict[str, Sample] = {}
    alike: dict[str, Sample] = {}
    for sample in (view for stored in samples for view in stored.per_image()):
        if owners := by_bytes.get(hashlib.blake2b(sample.image).digest()):
            same |= dict.fromkeys(owners, sample)
        else:
            alike |= dict.fromkeys(by_name.get(sample.id, ()), sample)
    named = alike.keys() - same.keys()
    refuse_shared((entry.file, alike[entry.id].id) for entry in entries if entry.id in named)
    return _checked(entries, alike | same)


def page_data(
    entries: Sequence[PredictedFile],
    truths: Mapping[str, Sample],
    score_threshold: float,
    max_images: int,
    image_size: int,
) -> dict[str, Any]:
    """Return all that the page shows of the `max_images` images with the most errors, and the totals of the others.

    Among images with equally many errors at the threshold, those with more other words are kept.
    """
    names = shown_names([entry.file for entry in entries])
    images = [_image(entry, name, truths.get(entry.id)) for entry, name in zip(entries, names, strict=True)]
    source = next((name for name in SOURCES if any(image[name] is not None for image in images)), "head")

    def worst_first(index: int) -> list[float]:
        return [-num_errors(images[index], source, score_threshold, words_count) for words_count in (False, True)]

    classes = class_data(entries, truths, source, max(score_threshold, least_score(entries)))
    number = {name: index for index, name in enumerate([] if classes is None else classes["names"])}
    order = sorted(range(len(entries)), key=worst_first)
    kept, left_out = sorted(order[:max_images]), sorted(order[max_images:])
    for index in kept:
        truth = truths.get(entries[index].id)
        data = _read(entries[index].file) or (b"" if truth is None else truth.image)
        images[index]["thumbnail"] = thumbnail(data, image_size)
        for item in (item for name in (*SOURCES, "truth") for item in images[index][name] or ()):
            item["class"] = number.get(normalized_caption(item["caption"]))
    return {
        "threshold": score_threshold,
        "least": least_score(entries, below=True),
        "captions_from": least_score(entries),
        "iou": IOU,
        "classes": classes,
        "images": [images[index] for index in kept],
        "left_out": [_counted(images[index]) for index in left_out],
    }


def class_data(
    entries: Sequence[PredictedFile], truths: Mapping[str, Sample], source: str, score_threshold: float
) -> Page | None:
    """Return what the page shows of each class: scores, confusions and worst images, as `CategoryReport` has them.

    `names` are those of the truth, most truths first, then others that were predicted; `scores` has (truths, AP, AP50,
    recall) and `worst` (id, errors) of the first of them. A `confusion` is (true, predicted, boxes) in places of
    `names`, -1 for none. AP counts what `predict.py` wrote with captions, so it is at most that of `recipe/eval.py`.
    None if there is no truth with a caption.
    """
    predictions, samples = [], []
    for entry in entries:
        prediction, truth = entry.prediction, truths.get(entry.id)
        if prediction is None or truth is None:
            continue
        objects = prediction.objects if source == "head" else prediction.answer_objects or ()
        predictions.append(replace(prediction, id=entry.id, objects=tuple(objects)))
        samples.append(replace(truth, id=entry.id, width=prediction.width, height=prediction.height))
    report = report_categories(predictions, samples, score_threshold).to_json()
    pairs = report["confusion"]
    number = {name: index for index, name in enumerate(report["scores"])}
    for name in (name for pair in pairs for name in pair[:2] if name != NOTHING):
        number.setdefault(name, len(number))
    if not report["scores"]:
        return None
    return {
        "threshold": score_threshold,
        "names": list(number),
        "scores": [list(scores.values()) for scores in report["scores"].values()],
        "worst": [report["worst"].get(name, []) for name in report["scores"]],
        "confusion": [[number.get(true, -1), number.get(found, -1), count] for true, found, count in pairs],
        "scores_left_out": report["scores_left_out"],
        "confusion_left_out": report["confusion_left_out"],
    }


def shown_names(files: Sequence[str]) -> list[str]:
    """Return each file's path below the folder that holds them all: the page may be given to others."""
    paths = [os.path.abspath(file) for file in files]
    above = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [os.path.relpath(path, above) for path in paths]


def num_errors(image: Page, source: str, score_threshold: float, words_count: bool = False) -> float:
    """Return the missed and false boxes of one of `SOURCES`, as the page counts them.

    -1 if the truth is not known, infinite if the image could not be used. Boxes of the text answer have no score and
    always count. With `words_count` a box at the right place in other words is an error too.
    """
    if image["error"] is not None:
        return float("inf")
    if image["num_wanted"] is None:
        return -1
    shown = [item for item in image[source] or () if item.get("score", 1.0) >= score_threshold]
    num_false = sum(item["match"] == FALSE for item in shown)
    num_missed = image["num_wanted"] - sum(item["match"] >= 0 for item in shown)
    return num_false + num_missed + (sum(item["other_words"] for item in shown) if words_count else 0)


def thumbnail(data: bytes, size: int) -> str | None:
    """Return a JPEG of at most `size` pixels per side as a data URL; None if `data` is not an image."""
    try:
        image = open_image(data)
    except ValueError:
        return None
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return jpeg_url(image)


def jpeg_url(image: Image.Image) -> str:
    """Return an RGB image as a data URL."""
    file = BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def render(page: Mapping[str, Any]) -> str:
    """Return the page as HTML; no text of the data can end the script element that holds it."""
    data = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", data)


def _image(entry: PredictedFile, name: str, truth: Sample | None) -> dict[str, Any]:
    image: dict[str, Any] = {"id": entry.id, "file": name, "error": entry.error}
    image |= dict.fromkeys(("width", "height", "answer", "thumbnail", "head", "text", "truth", "num_wanted"))
    wanted, prediction = None if truth is None else truth.objects, entry.prediction
    if prediction is not None:
        image |= {"width": prediction.width, "height": prediction.height, "answer": prediction.answer}
        if prediction.with_head:
            image["head"] = _judged(prediction.objects, truth, with_score=True, below=entry.objects_below or ())
        if prediction.answer_objects is not None:
            image["text"] = _judged(prediction.answer_objects, truth, with_score=False)
    if wanted is not None:
        image["truth"] = [{"box": item.box, "caption": item.caption, "iscrowd": item.iscrowd} for item in wanted]
        image["num_wanted"] = sum(not item.iscrowd for item in wanted)
    return image


def _judged(
    found: Sequence[DetectedObject],
    sample: Sample | None,
    with_score: bool,
    below: Sequence[DetectedObject] = (),
) -> list[dict[str, Any]]:
    """Return objects by falling score, with the truth that each finds and whether its caption differs.

    Those `below` the threshold come last. They have no captions, so theirs do not differ.
    """
    captioned, wanted = len(found), None if sample is None else sample.objects
    found = [*sorted(found, key=lambda item: -item.score), *sorted(below, key=lambda item: -item.score)]
    matches = [IGNORED] * len(found)
    if sample is not None and wanted is not None:
        matches = found_truths(found, wanted, IOU, is_unsure(found, sample))
    rows = []
    for index, (item, match) in enumerate(zip(found, matches, strict=True)):
        truth = item if match < 0 or wanted is None or index >= captioned else wanted[match]
        differs = normalized_caption(item.caption) != normalized_caption(truth.caption)
        score = {"score": item.score} if with_score else {}
        rows.append({"box": item.box, **score, "caption": item.caption, "match": match, "other_words": differs})
    return rows


def _counted(image: Page) -> dict[str, Any]:
    """Return what `num_errors` and the page's totals need, without thumbnail, boxes and words."""
    counted: dict[str, Any] = {key: image[key] for key in ("error", "num_wanted", *SOURCES)}
    for source in SOURCES:
        if counted[source] is not None:
            keys = ("match", "other_words", "score") if source == "head" else ("match", "other_words")
            counted[source] = [{key: item[key] for key in keys} for item in counted[source]]
    return counted


def _checked(entries: Iterable[PredictedFile], truths: dict[str, Sample]) -> dict[str, Sample]:
    for entry in entries:
        truth, prediction = truths.get(entry.id), entry.prediction
        if truth is None or prediction is None or not truth.width:
            continue
        if (truth.width, truth.height) != (prediction.width, prediction.height):
            raise ValueError(
                f"{entry.file} was predicted on {prediction.width} x {prediction.height} pixels, but its truth has "
                f"{truth.width} x {truth.height}: give the truth of the same images"
            )
    return truths


def _read(file: str) -> bytes:
    """Return the bytes of a file; empty if it cannot be read."""
    try:
        return Path(file).read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    try:
        sys.exit(1 if main(parse_gallery(sys.argv[1:])) else 0)
    except ValueError as error:
        sys.exit(f"error: {error}")
