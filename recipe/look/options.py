"""Parse the command line of `python -m recipe.look`, without heavy imports: a mistake costs no seconds."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipe.configure import expand_home, load_config
from recipe.records import INDEX_FILE
from recipe.rules import check_fields

MAX_PIXELS = 802816  # of the yamls: 1,024 vision tokens
_EXAMPLES = """examples:
  python -m recipe.look data/train_set --split train
  python -m recipe.look data/train_set --split train --config yamls/joint.yaml --out page.html
  python -m recipe.look data/train_set --split val --max-pixels 1605632 --checkpoint runs/tiny"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line; `folder` is that of the shards, `config` a `RecipeConfig` or None.

    Raises:
        ValueError: There is no such data set, or the yaml of --config is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recipe.look",
        description="Make one page that shows whether a converted data set is right.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", metavar="OUT", help="the folder that a converter wrote")
    parser.add_argument("--split", default="", metavar="NAME", help="the part of it, such as train")
    parser.add_argument("--config", metavar="YAML", help="of a run: its pixel budget, prompt and checkpoint apply")
    what = f"largest image that the model sees; default: the config's, else the checkpoint's, else {MAX_PIXELS}"
    parser.add_argument("--max-pixels", type=int, metavar="N", help=what)
    what = "folder or name on the hub, whose tokenizer counts the tokens; default: the config's"
    parser.add_argument("--checkpoint", metavar="CKPT", help=what)
    parser.add_argument("--out", type=Path, metavar="HTML", help="the page; default: OUT/look_SPLIT.html")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that exists")
    what = "images shown at random; the others are a third as many each; default %(default)s"
    parser.add_argument("--num-images", type=int, default=12, metavar="N", help=what)
    args = parser.parse_args([expand_home(argument) for argument in arguments])
    for name in ("max_pixels", "num_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    args.folder = _find_folder(args.set, args.split)
    args.out = args.out or Path(args.set, f"look_{args.split.replace('/', '_')}.html" if args.split else "look.html")
    if args.config is not None:
        args.config = load_config(args.config)
        check_fields(args.config)
    return args


def _find_folder(out: str, split: str) -> Path:
    """Return the folder of the shards; raise ValueError if there is none, with the splits that there are."""
    if "://" in out:
        raise ValueError(f"{out} is an address: give a folder, such as a copy of it")
    folder = Path(out, split)
    if (folder / INDEX_FILE).is_file():
        return folder
    if not Path(out).is_dir():
        raise ValueError(f"{out} does not exist: give the --out folder of a conversion")
    splits = sorted(str(path.parent.relative_to(out)) for path in Path(out).glob(f"*/{INDEX_FILE}"))
    remedy = "convert a data set into it first (python -m convert lists the formats)"
    if splits:
        remedy = f"give --split {' or '.join(splits)}"
    raise ValueError(f"{folder} holds no {INDEX_FILE}, so it is not a converted data set: {remedy}")
