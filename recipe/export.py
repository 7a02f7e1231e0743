"""Export a checkpoint: `python recipe/export.py --checkpoint CKPT --out DIR [--config YAML]`; see --help.

DIR then loads with transformers' `from_pretrained`, and with `recipe/predict.py --checkpoint DIR`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from recipe.configure import expand_home, load_config
from recipe.console import setup_logging
from recipe.redact import redact_text
from recipe.rules import check_fields

log = logging.getLogger("recipe.export")  # its __name__ is __main__

EXAMPLES = """examples:
  python recipe/export.py --checkpoint runs/joint/checkpoints/latest-rank0.pt --out exported
  python recipe/predict.py --checkpoint exported --out found images/
  python recipe/export.py --checkpoint runs/lora/checkpoints/latest-rank0.pt --out adapters --adapters

DIR holds the language model and processor for transformers' from_pretrained, which read text and images but find no
boxes; the detection head (detection_head.safetensors); and the run's configuration (recipe.yaml), whose keys
recipe/config.py documents."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description="Write a trained model as a folder that transformers and recipe/predict.py load.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="a Composer checkpoint: a .pt file, or the folder of a sharded one",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder to write")
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="of a run with `lora`: write its adapters as peft reads them on the base model, instead of merging them",
    )
    parser.add_argument("--config", metavar="YAML", help="default: the config.yaml saved with the run")
    return parser.parse_args([expand_home(argument) for argument in arguments])


def main(args: argparse.Namespace) -> None:
    """Write the folder; raise ValueError if the checkpoint cannot be loaded or the folder is not empty."""
    config = load_config(args.config) if args.config else None
    if config is not None:
        check_fields(config)
    # Imported late because they take seconds: a mistake in the yaml is reported before.
    from recipe.checkpoints.weights import export_model
    from recipe.load import drop_ineffective_flags, load_network

    network, processor, config = load_network(args.checkpoint, config, in_nf4=args.adapters)
    generation = network.vlm.hf_model.generation_config
    if generation is not None and (dropped := drop_ineffective_flags(generation)):
        log.warning("generation_config.json: left out %s, which have no effect as they are set", ", ".join(dropped))
    export_model(network, processor, config, args.out, only_adapters=args.adapters)
    print(f"wrote {args.checkpoint} to {args.out}")


if __name__ == "__main__":
    setup_logging()
    try:
        main(parse(sys.argv[1:]))
    except ValueError as error:
        sys.exit(redact_text(f"error: {error}"))
