"""Export a checkpoint: `python recipe/export.py --checkpoint CKPT --out DIR [--config YAML]`; see --help.

DIR then loads with transformers' `from_pretrained`, and with `recipe/predict.py --checkpoint DIR`.
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.configure import expand_home, load_config
from recipe.console import setup_logging
from recipe.redact import redact_text
from recipe.rules import check_fields

if TYPE_CHECKING:
    from PIL import Image

    from recipe.config import RecipeConfig
    from recipe.models.network import JointNetwork
    from recipe.publish.card import Facts

log = logging.getLogger("recipe.export")  # its __name__ is __main__

EXAMPLES = """examples:
  python recipe/export.py --checkpoint runs/joint/checkpoints/latest-rank0.pt --out exported
  python recipe/predict.py --checkpoint exported --out found images/
  python recipe/export.py --checkpoint runs/lora/checkpoints/latest-rank0.pt --out adapters --adapters

DIR holds the language model and processor for transformers' from_pretrained, which read text and images but find no
boxes; the detection head (detection_head.safetensors); the run's configuration (recipe.yaml), whose keys
recipe/config.py documents; a model card (README.md), to be completed by you; and hashes of all that the run trained
(trained_tensors.json). With --evaluation its scores are those that recipe/eval.py calibrated."""


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
    what = "run folder of recipe/eval.py with this checkpoint: its scores for the card, its calibration for the scores"
    parser.add_argument("--evaluation", type=Path, metavar="DIR", help=what)
    what = "draw what the model finds on it for the card"
    parser.add_argument("--example", type=Path, metavar="IMAGE", help=what)
    what = "of the model, as the hub names it, such as apache-2.0; default: unknown, for you to set"
    parser.add_argument("--license", metavar="ID", help=what)
    what = "upload DIR to this private repository of the Hugging Face hub, with the token of HF_TOKEN or a login"
    parser.add_argument("--push-to-hub", metavar="NAME", help=what)
    parser.add_argument("--public", action="store_true", help="with --push-to-hub: make a new repository public")
    return parser.parse_args([expand_home(argument) for argument in arguments])


def main(args: argparse.Namespace) -> None:
    """Write the folder; raise ValueError if the checkpoint cannot be loaded or the folder is not empty."""
    config = load_config(args.config) if args.config else None
    if config is not None:
        check_fields(config)
    # Imported late because they take seconds: a mistake in the yaml is reported before.
    from recipe.checkpoints.weights import export_model, refuse_full
    from recipe.load import drop_ineffective_flags, load_network
    from recipe.metrics.calibration import CALIBRATION_FILE, read_calibration
    from recipe.publish.card import USE, write_card
    from recipe.publish.hub import Push
    from recipe.publish.trained import check_trained, merged_layers, trained_hashes, with_merged

    refuse_full(args.out)
    push = None if args.push_to_hub is None else Push.prepare(args.push_to_hub, args.public)
    facts = facts_of(args)
    network, processor, config = load_network(args.checkpoint, config, in_nf4=args.adapters)
    calibration = find_calibration(args)
    if calibration is not None:
        config = replace(config, evaluation=read_calibration(calibration, config.evaluation))
    if args.example is not None:
        facts = replace(facts, example=(draw_example(args.example, network, processor, config), args.example.name))
    generation = network.vlm.hf_model.generation_config
    if generation is not None and (dropped := drop_ineffective_flags(generation)):
        log.warning("generation_config.json: left out %s, which have no effect as they are set", ", ".join(dropped))
    hashes = trained_hashes(args.checkpoint, network, config)
    layers = set[str]() if args.adapters else merged_layers(network)

    def complete(folder: Path) -> None:
        check_trained(folder, with_merged(hashes, network, layers) if layers else hashes)
        if calibration is not None:
            shutil.copyfile(calibration, folder / CALIBRATION_FILE)
        write_card(folder, config, facts, args.adapters)

    export_model(network, processor, config, args.out, only_adapters=args.adapters, complete=complete)
    print(f"wrote {args.checkpoint} to {args.out}")
    if network.has_head:
        lines = "\n".join(f"  {line}" for line in USE.format(name=args.out).splitlines() if line)
        print(f"transformers alone gives the text only; these lines give the boxes:\n{lines}")
    if push is not None:
        print(f"pushed to {push.upload(Path(args.out))}")


def facts_of(args: argparse.Namespace) -> "Facts":
    """Return what the card says of an evaluation and of the checkpoint; raise ValueError if they cannot be read."""
    from recipe.publish.card import Facts, read_scores

    facts = Facts(name=args.push_to_hub or Path(args.out).absolute().name, scores={}, license=args.license)
    path = Path(args.checkpoint).resolve()  # the newest has two names, and one manifest
    if (path.exists() and not path.is_dir()) or (path / "manifest.json").is_file():
        from recipe.checkpoints.check import read_manifest  # imports Composer, which takes seconds
        from recipe.checkpoints.places import LocalFolder

        manifest = read_manifest(LocalFolder(path.parent), path.name)
        if manifest is not None:
            scored = "measured by the training when it saved the checkpoint"
            facts = replace(facts, scores=manifest.scores or {}, scored=scored, steps=manifest.batch)
            facts = replace(facts, processes=manifest.world_size)
    if args.evaluation is not None:
        facts = replace(facts, scores=read_scores(args.evaluation / "eval.json"), scored="measured by recipe/eval.py")
    return facts


def find_calibration(args: argparse.Namespace) -> Path | None:
    """Return the calibration to export; None without one, which is logged if the run's folder holds one."""
    from recipe.metrics.calibration import CALIBRATION_FILE

    if args.evaluation is not None:
        path = args.evaluation / CALIBRATION_FILE
        return path if path.is_file() else None
    for folder in list(Path(args.checkpoint).absolute().parents)[:3]:
        if (folder / CALIBRATION_FILE).is_file():
            log.warning(
                "%s/%s is left out: if it is of this checkpoint, give --evaluation %s",
                *[folder, CALIBRATION_FILE, folder],
            )
            break
    return None


def draw_example(path: Path, network: "JointNetwork", processor: Any, config: "RecipeConfig") -> "Image.Image":
    """Return a drawing of what the model finds on an image; raise ValueError if the image cannot be used."""
    import torch

    from recipe.images import open_image
    from recipe.inference.detector import Detector
    from recipe.inference.predictor import Request, predictor_of
    from recipe.prediction.draw import draw_prediction

    found = Detector(predictor_of(network, processor, config, Request(), torch.device("cpu")))(path)
    image = open_image(path.read_bytes())
    found = replace(found, id=path.name)  # which the drawing shows: no folders of this machine
    return draw_prediction(image, found, None, config.evaluation.score_threshold, [], network.has_head)


if __name__ == "__main__":
    setup_logging()
    try:
        main(parse(sys.argv[1:]))
    except ValueError as error:
        sys.exit(redact_text(f"error: {error}"))
