"""Export: `python recipe/export.py --checkpoint CKPT --out DIR [--config YAML]`.

DIR then loads with transformers' `from_pretrained`, and with `recipe/predict.py --checkpoint DIR`.
"""

import argparse
import sys
from collections.abc import Sequence

from recipe.build import load_model
from recipe.checkpoints.weights import export_model
from recipe.configure import load_config
from recipe.console import setup_logging


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a trained model as a folder that transformers loads.")
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="a Composer checkpoint (.pt)")
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder to write")
    parser.add_argument("--config", metavar="YAML", help="default: the config.yaml saved with the run")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Loads the checkpoint and writes the folder.

    Raises:
        ValueError: The checkpoint cannot be loaded, or the folder is not empty.
    """
    model, processor, config = load_model(args.checkpoint, load_config(args.config) if args.config else None)
    export_model(model, processor, config, args.out)
    print(f"wrote {args.checkpoint} to {args.out}")


if __name__ == "__main__":
    setup_logging()
    try:
        main(parse(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
