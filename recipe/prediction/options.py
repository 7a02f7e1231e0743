"""Parse the command lines of predict.py and gallery.py, without heavy imports: a mistake costs no seconds."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipe.configure import expand_home, load_config
from recipe.rules import check_fields

TILE_OVERLAP = 0.2
SMALLEST_TILE = 112  # pixels: four vision tokens of Qwen2.5-VL along a side
GALLERY_THRESHOLD = 0.3  # where the slider starts, if nothing is given
EXAMPLES = """examples:
  python recipe/predict.py --checkpoint runs/joint/checkpoints/latest-rank0.pt --out found images/
  python recipe/predict.py --checkpoint exported --out found --expression "a red car" 'images/*.jpg'
  composer -n 8 recipe/predict.py --checkpoint exported --out found s3://bucket/images   # killed? start it again
  python -m recipe.gallery --predictions found/predictions.json --out found/gallery.html   # one page of all images

found/predictions.json holds objects and answers, found/coco_results.json the objects in COCO's form. Defaults come from
the sections evaluation and prompt of the run's config.yaml; recipe/config.py documents their keys."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line of predict.py; --help and a wrong flag end the process.

    Raises:
        ConfigError: The yaml of --config is wrong; names the key and the remedy.
    """
    parser = argparse.ArgumentParser(
        prog="python recipe/predict.py",
        description="Find and describe the objects of images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, a folder, a quoted glob, s3://...")
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="a .pt file, or a folder from export.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of predictions.json and the drawings")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in DIR")
    parser.add_argument("--no-drawings", action="store_true", help="write the JSON files alone")
    parser.add_argument("--config", metavar="YAML", help="default: what was saved with the checkpoint")
    what = "text: the language model's, boxes: the head's; default: the run's"
    parser.add_argument("--answer", choices=("text", "boxes", "both"), help=what)
    parser.add_argument("--score-threshold", type=float, metavar="F", help="least score; default: the run's")
    what = "from eval.py: calibrated scores and their threshold"
    parser.add_argument("--calibration", type=Path, metavar="YAML", help=what)
    parser.add_argument("--nms-iou", type=float, metavar="F", help="drop the worse of two boxes that overlap more")
    what = "also predict overlapping tiles of N x N pixels of larger images: finds small objects"
    parser.add_argument("--tile", type=int, metavar="N", help=what)
    what = f"least share of a tile that it has in common with the next; default {TILE_OVERLAP}"
    parser.add_argument("--overlap", type=float, metavar="F", help=what)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once; default %(default)s")
    what = "keep finished parts of N images: the same command continues after a kill. Default: of several processes"
    parser.add_argument("--part-images", type=int, metavar="N", help=what)
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer; default: the run's")
    parser.add_argument("--prompt", metavar="TEXT", help="asked instead of the run's prompt and candidate phrases")
    what = "look for this (candidate phrase); repeatable"
    parser.add_argument("--expression", action="append", metavar="TEXT", help=what)
    what = "one of these for each object, with scores, in place of a caption; or a file, one a line"
    parser.add_argument("--classes", metavar="A,B,...", help=what)
    what = "solved examples: MDS shards, or a .jsonl and images"
    parser.add_argument("--teachers", type=Path, metavar="FOLDER", help=what)
    what = "first N of FOLDER; default: as in training, else all"
    parser.add_argument("--num-teachers", type=int, metavar="N", help=what)
    what = "COCO instances file: draw the truth next to the prediction, use its ids in coco_results.json"
    parser.add_argument("--truth", type=Path, metavar="JSON", help=what)
    what = "COCO instances file with their ids; default: that of --truth, else 1, 2, ..."
    parser.add_argument("--image-ids", type=Path, metavar="JSON", help=what)
    args = _parse_numbers(parser, arguments, ("batch_size", "max_new_tokens", "num_teachers", "part_images"))
    if args.nms_iou is not None and not 0 < args.nms_iou < 1:
        parser.error(f"--nms-iou {args.nms_iou}: must be between 0 and 1")
    for name, texts in (("prompt", [args.prompt]), ("expression", args.expression or [])):
        if any(text is not None and not text.strip() for text in texts):
            parser.error(f"--{name}: is empty; give a text, or leave it out for the run's prompt")
    if args.classes is not None:
        args.classes = _read_classes(parser, args.classes)
    if args.tile is None and args.overlap is not None:
        parser.error("--overlap needs --tile N")
    if args.overlap is not None and not 0 <= args.overlap <= 0.9:
        parser.error(f"--overlap {args.overlap}: must be between 0 and 0.9")
    if args.tile is not None and args.tile < SMALLEST_TILE:
        parser.error(f"--tile {args.tile}: must be {SMALLEST_TILE} or more")
    if args.tile is not None and args.answer == "text":
        parser.error("--tile finds the head's objects: give --answer boxes or both")
    if args.part_images is not None and args.part_images % args.batch_size:
        parser.error(f"--part-images {args.part_images}: must be a multiple of --batch-size {args.batch_size}")
    if args.num_teachers is not None and args.teachers is None:
        parser.error("--num-teachers needs --teachers FOLDER")
    if args.config is not None:
        check_fields(load_config(args.config))
    return args


def _read_classes(parser: argparse.ArgumentParser, value: str) -> list[str]:
    """Return the names of --classes: the lines of a file, or the parts between commas."""
    try:
        text = Path(value).read_text(encoding="utf-8") if Path(value).is_file() else value.replace(",", "\n")
    except (OSError, ValueError) as error:
        parser.error(f"--classes {value}: cannot be read as text ({error})")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) < 2:
        parser.error(f"--classes {value}: {len(names)} names; give two or more, separated by commas")
    return names


def parse_gallery(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line of `recipe.gallery`."""
    parser = argparse.ArgumentParser(description="Make a page of predictions next to the truth.")
    parser.add_argument("--predictions", type=Path, required=True, metavar="JSON", help="from recipe/predict.py")
    parser.add_argument("--out", type=Path, required=True, metavar="HTML", help="the page")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that exists")
    truth = parser.add_mutually_exclusive_group()
    truth.add_argument("--truth", type=Path, metavar="JSON", help="COCO instances file")
    truth.add_argument("--data", type=Path, metavar="FOLDER", help="data set written by convert/")
    parser.add_argument("--split", metavar="NAME", help="of --data")
    what = f"of the slider at first; default {GALLERY_THRESHOLD}, or the predictions' own if that is higher"
    parser.add_argument("--score-threshold", type=float, metavar="F", help=what)
    what = "those with most errors; default %(default)s"
    parser.add_argument("--max-images", type=int, default=200, metavar="N", help=what)
    what = "longest side in the page; default %(default)s"
    parser.add_argument("--image-size", type=int, default=720, metavar="PIXELS", help=what)
    args = _parse_numbers(parser, arguments, ("max_images", "image_size"))
    if args.split is not None and args.data is None:
        parser.error("--split needs --data FOLDER")
    return args


def _parse_numbers(
    parser: argparse.ArgumentParser, arguments: Sequence[str], counts: Sequence[str]
) -> argparse.Namespace:
    """Return the parsed arguments; refuse a threshold outside [0, 1] and `counts` below 1."""
    args = parser.parse_args([expand_home(argument) for argument in arguments])
    if args.score_threshold is not None and not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold {args.score_threshold}: must be between 0 and 1")
    for name in counts:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    return args
