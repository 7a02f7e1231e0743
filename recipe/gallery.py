"""Predictions beside the truth: `python -m recipe.gallery --predictions DIR/predictions.json --out PAGE.html`.

The truth is a COCO instances file (`--truth instances.json`) or a converted data set (`--data FOLDER --split val`). The
page is one file that any browser opens, also from disk: small pictures are in it, nothing is loaded from elsewhere.
Pictures with the most missed and false boxes come first, at the threshold that its slider is set to. It goes down to
the threshold that the pictures were predicted with: what scored less is not in the file. Boxes at the right place in
other words are marked, and are errors where one sets "words count". The totals are of all pictures, also of those that
`--max-pictures` leaves out.
"""

import argparse
import base64
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from PIL import Image
from torchvision.ops import box_iou

from convert.annotated import read_coco
from recipe.console import setup_logging
from recipe.images import open_image
from recipe.metrics.gather import boxes_of, inside_crowd, match_by_score, normalized_caption
from recipe.prediction.files import least_score, read_rows, rounded_score, write_json_text
from recipe.prediction.inputs import entry_of, names_by_file, refuse_shared
from recipe.schema import Object, Sample
from recipe.upstream.storage import read_mds

TEMPLATE = Path(__file__).with_name("gallery.html")
IOU = 0.5  # from which on a prediction is at the right place
SCORE_THRESHOLD = 0.3  # where none is given
SOURCES = {"head": "objects", "text": "answer_objects"}  # of boxes, as the page and as an entry call them
FALSE, IGNORED = -1, -2  # instead of a truth's position
JPEG_QUALITY = 82

Row = Mapping[str, Any]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make a page of predictions beside the truth.")
    parser.add_argument("--predictions", type=Path, required=True, metavar="JSON", help="from recipe/predict.py")
    parser.add_argument("--out", type=Path, required=True, metavar="HTML", help="the page")
    parser.add_argument("--overwrite", action="store_true", help="replace the page where there is one")
    truth = parser.add_mutually_exclusive_group()
    truth.add_argument("--truth", type=Path, metavar="JSON", help="COCO instances file")
    truth.add_argument("--data", type=Path, metavar="FOLDER", help="data set written by convert/")
    parser.add_argument("--split", metavar="NAME", help="of --data")
    parser.add_argument(
        "--score-threshold",
        type=float,
        metavar="F",
        help=f"of the slider at first; default {SCORE_THRESHOLD}, or the predictions' own where that is higher",
    )
    parser.add_argument(
        "--max-pictures", type=int, default=200, metavar="N", help="those with most errors; default %(default)s"
    )
    parser.add_argument(
        "--picture-size", type=int, default=720, metavar="PIXELS", help="longest side in the page; default %(default)s"
    )
    args = parser.parse_args(arguments)
    if args.score_threshold is not None and not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold {args.score_threshold}: must be between 0 and 1")
    for name in ("max_pictures", "picture_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if args.split is not None and args.data is None:
        parser.error("--split needs --data FOLDER")
    return args


def main(args: argparse.Namespace) -> int:
    """Writes the page; the number of predictions whose picture or truth was not found.

    Raises:
        ValueError: A file cannot be read, belongs to other pictures, or would be overwritten.
    """
    check_out(args.out, args.overwrite)
    folder = args.predictions.parent
    rows = [{**row, "file": found_file(row["file"], folder)} for row in read_rows(args.predictions)]
    threshold = threshold_of(rows, args.score_threshold)
    if args.data is not None:
        truths = truths_of_mds(rows, read_mds(args.data, args.split))
    else:
        truths = {} if args.truth is None else truths_of_coco(rows, read_coco(args.truth))
    page = page_data(rows, truths, threshold, args.max_pictures, args.picture_size)
    try:
        write_json_text(args.out, render(page))
    except OSError as error:
        raise ValueError(f"cannot write {args.out} ({error}): give another --out") from error
    print(f"{len(page['pictures'])} of {len(rows)} pictures: {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB)")
    return report(rows, truths, page, args.truth or args.data, folder)


def check_out(out: Path, overwrite: bool) -> None:
    """Makes the page's folder and tries to write there, before any work.

    Raises:
        ValueError: The page would overwrite something, or cannot be written.
    """
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


def found_file(file: str, folder: Path) -> str:
    """Where a picture lies: as predict.py was told, else from the folder of the predictions; `file` where it is not."""
    if not Path(file).exists() and (folder / file).exists():
        return str(folder / file)
    return file


def threshold_of(rows: Sequence[Row], wanted: float | None) -> float:
    """Where the slider is at first.

    Raises:
        ValueError: The rows lack objects of the score that is wanted.
    """
    least = least_score(rows)
    if wanted is None:
        return max(SCORE_THRESHOLD, least)
    if rounded_score(wanted) < least:
        raise ValueError(
            f"--score-threshold {wanted}: the predictions hold only what scored {least} or more; give at least that, "
            f"or predict again with --score-threshold {wanted}"
        )
    return rounded_score(wanted)


def report(rows: Sequence[Row], truths: Mapping[str, Sample], page: Row, truth: Path | None, folder: Path) -> int:
    """Tells what is missing from the page; how much that is."""
    without_truth = [row["file"] for row in rows if truth is not None and row["id"] not in truths]
    without_picture = [item["file"] for item in page["pictures"] if not item["image"] and item["error"] is None]
    unread = (
        f"the picture cannot be read, neither from {Path.cwd()}, where this command runs, nor from {folder.resolve()}: "
        "run it in the folder where predict.py ran"
    )
    for files, what in (
        (without_truth, f"not in {truth} (folders count where its names have them)"),
        (without_picture, unread),
    ):
        if files:
            print(f"{len(files)} pictures: {what}: {', '.join(files[:5])}", file=sys.stderr)
    return len(without_truth) + len(without_picture)


def truths_of_coco(rows: Sequence[Row], samples: Mapping[str, Sample]) -> dict[str, Sample]:
    """The truth of each prediction by its id, from samples by `file_name`.

    Raises:
        ValueError: Several samples can be a picture's, or one several pictures', or it is of a picture of another size.
    """
    names = names_by_file(samples)
    found = {row["id"]: entry_of(Path(row["file"]), names) for row in rows}
    claims = {row_id: name for row_id, name in found.items() if name is not None}
    refuse_shared((row["file"], claims[row["id"]]) for row in rows if row["id"] in claims)
    return _checked(rows, {row_id: samples[name] for row_id, name in claims.items()})


def truths_of_mds(rows: Sequence[Row], samples: Iterable[Sample]) -> dict[str, Sample]:
    """The truth of each prediction by its id: the sample of the same bytes, else the one that is called as its file.

    A picture that was predicted twice has its truth twice. A name counts only where no prediction has the sample's
    bytes.

    Raises:
        ValueError: Several pictures are called as one sample, or the truth is of a picture of another size.
    """
    by_bytes, by_name = defaultdict[bytes, list[str]](list), defaultdict[str, list[str]](list)
    for row in rows:
        by_bytes[_digest(_read(row["file"]))].append(row["id"])
        by_name[Path(row["file"]).stem].append(row["id"])
    by_bytes.pop(b"", None)
    same: dict[str, Sample] = {}
    alike: dict[str, Sample] = {}
    for sample in samples:
        owners = by_bytes.get(_digest(sample.image))
        if owners:
            same |= dict.fromkeys(owners, sample)
        else:
            alike |= dict.fromkeys(by_name.get(sample.id, ()), sample)
    named = alike.keys() - same.keys()
    refuse_shared((row["file"], alike[row["id"]].id) for row in rows if row["id"] in named)
    return _checked(rows, alike | same)


def page_data(
    rows: Sequence[Row], truths: Mapping[str, Sample], score_threshold: float, max_pictures: int, picture_size: int
) -> dict[str, Any]:
    """All that the page shows, of the `max_pictures` pictures with the most errors at the threshold.

    Of the others it holds what the totals need. Among pictures with as many errors, those with more other words are
    kept.
    """
    pictures = [_picture(row, truths.get(row["id"])) for row in rows]
    source = next((name for name, key in SOURCES.items() if any(row[key] is not None for row in rows)), "head")

    def worst_first(index: int) -> list[float]:
        return [-num_errors(pictures[index], source, score_threshold, words_count) for words_count in (False, True)]

    order = sorted(range(len(rows)), key=worst_first)
    kept, left_out = sorted(order[:max_pictures]), sorted(order[max_pictures:])
    for index in kept:
        truth = truths.get(rows[index]["id"])
        data = _read(rows[index]["file"]) or (b"" if truth is None else truth.image)
        pictures[index]["image"] = thumbnail(data, picture_size)
    return {
        "threshold": score_threshold,
        "least": least_score(rows),
        "iou": IOU,
        "pictures": [pictures[index] for index in kept],
        "left_out": [_counted(pictures[index]) for index in left_out],
    }


def matches_of(objects: Sequence[Row], truth: Sequence[Object]) -> list[int]:
    """Which truth each prediction finds: its position, `FALSE`, or `IGNORED` in a crowd region.

    Best scores first, each the free truth it overlaps most. So it does not depend on a threshold: those from a score
    on are matched as if the others were not there.

    Args:
        objects: By falling score, with `box`.
        truth: Crowd regions are no truths to find.
    """
    boxes = torch.tensor([item["box"] for item in objects], dtype=torch.float64).reshape(-1, 4)
    wanted = [index for index, item in enumerate(truth) if not item.iscrowd]
    crowds = boxes_of([item for item in truth if item.iscrowd])
    matches = [IGNORED if inside else FALSE for inside in inside_crowd(boxes, crowds, IOU).tolist()]
    for found, place in match_by_score(box_iou(boxes, boxes_of([truth[index] for index in wanted])), IOU):
        matches[found] = wanted[place]
    return matches


def num_errors(picture: Row, source: str, score_threshold: float, words_count: bool = False) -> float:
    """Missed and false boxes of one of `SOURCES`, as the page counts them.

    -1 where the truth is not known, infinite where the picture could not be used.

    Args:
        picture: Of `page_data`.
        source: Whose boxes.
        score_threshold: From which on they are shown; those of the text answer have no score, and always are.
        words_count: A box at the right place in other words is an error too.
    """
    if picture["error"] is not None:
        return float("inf")
    if picture["num_wanted"] is None:
        return -1
    shown = [item for item in picture[source] or () if item.get("score", 1.0) >= score_threshold]
    num_false = sum(item["match"] == FALSE for item in shown)
    num_missed = picture["num_wanted"] - sum(item["match"] >= 0 for item in shown)
    return num_false + num_missed + (sum(item["other_words"] for item in shown) if words_count else 0)


def thumbnail(data: bytes, size: int) -> str | None:
    """A JPEG of at most `size` pixels a side as an address that holds it; None where `data` is no picture."""
    try:
        image = open_image(data)
    except ValueError:
        return None
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    file = BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def render(page: Mapping[str, Any]) -> str:
    """The page as HTML; no text of the data can end the script element that holds it."""
    data = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", data)


def _picture(row: Row, truth: Sample | None) -> dict[str, Any]:
    wanted = None if truth is None else truth.objects
    return {
        **{key: row[key] for key in ("id", "file", "width", "height", "answer", "error")},
        "image": None,
        **{source: None if row[key] is None else _matched(row[key], wanted) for source, key in SOURCES.items()},
        "truth": None
        if wanted is None
        else [{"box": item.box, "caption": item.caption, "iscrowd": item.iscrowd} for item in wanted],
        "num_wanted": None if wanted is None else sum(not item.iscrowd for item in wanted),
    }


def _matched(objects: Iterable[Row], wanted: Sequence[Object] | None) -> list[dict[str, Any]]:
    """Objects by falling score, with the truth that each finds, and whether that is called otherwise."""
    objects = sorted(objects, key=lambda item: -item.get("score", 1.0))
    if wanted is None:
        return [{**item, "match": IGNORED, "other_words": False} for item in objects]
    captions = [normalized_caption(item.caption) for item in wanted]
    return [
        {**item, "match": match, "other_words": match >= 0 and normalized_caption(item["caption"]) != captions[match]}
        for item, match in zip(objects, matches_of(objects, wanted), strict=True)
    ]


def _counted(picture: Row) -> dict[str, Any]:
    """What of a picture `num_errors` and the totals of the page need: no image, no boxes, no words."""
    counted: dict[str, Any] = {key: picture[key] for key in ("error", "num_wanted", *SOURCES)}
    for source in SOURCES:
        if counted[source] is not None:
            keys = ("match", "other_words", "score") if source == "head" else ("match", "other_words")
            counted[source] = [{key: item[key] for key in keys} for item in counted[source]]
    return counted


def _checked(rows: Iterable[Row], truths: dict[str, Sample]) -> dict[str, Sample]:
    for row in rows:
        truth = truths.get(row["id"])
        if truth is None or row["error"] is not None or not truth.width:
            continue
        if (truth.width, truth.height) != (row["width"], row["height"]):
            raise ValueError(
                f"{row['file']} was predicted on {row['width']} x {row['height']} pixels, but its truth is of "
                f"{truth.width} x {truth.height}: give the truth of these very pictures"
            )
    return truths


def _read(file: str) -> bytes:
    """The bytes of a file; none where it cannot be read."""
    try:
        return Path(file).read_bytes()
    except OSError:
        return b""


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest() if data else b""


if __name__ == "__main__":
    setup_logging()
    try:
        sys.exit(1 if main(parse(sys.argv[1:])) else 0)
    except ValueError as error:
        sys.exit(f"error: {error}")
