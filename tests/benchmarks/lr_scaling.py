"""Whether `optimizer.lr_scaling` helps when the tokens of a step change: packs of other sizes, the same scenes.

    python tests/benchmarks/lr_scaling.py [--scenes N] [--seeds SEED ...]

Detection alone is trained, as in `convergence.py`, on scenes of shapes that are each seen once, in steps of one pack.
The rates are meant for packs of 2,048 tokens. Packs of 512 and 8,192 then give four times and a quarter of the steps;
each is trained with the same rates, with rates by the root of the tokens per step, and with rates in proportion. The
warm-up is a tenth of the run.

The last line is JSON: `ap50`, by pack and rule, over 128 other scenes, one value per seed.
"""

import argparse
import json
import logging
from typing import Any

import torch

import convergence
from convergence import Curve, make_data, train_head
from recipe.callbacks import table

REFERENCE = 2048  # tokens of a pack
PACKS = (512, 2048, 8192)
RULES = ("none", "sqrt", "linear")


def changes_of(max_tokens: int, rule: str, scenes: int, tokens: float) -> dict[str, Any]:
    """What differs from `convergence.py`; `tokens` are those of a step of the reference."""
    return {
        "train_loader.packing": f"{{max_tokens: {max_tokens}}}",
        "train_loader.global_batch_size": 1,
        "train_loader.streams.shapes.choose": scenes,
        "optimizer.lr_scaling": rule,
        "optimizer.reference_tokens": round(tokens),
        "scheduler.t_warmup": "0.1dur",
    }


def main(arguments: list[str] | None = None) -> None:
    """Train each pair of a pack and a rule; print a row of each."""
    parser = argparse.ArgumentParser(description="Compare rules of lr_scaling.")
    parser.add_argument("--scenes", type=int, default=2400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    make_data()
    table.CALLBACKS = {**table.CALLBACKS, "curve": Curve}
    found: dict[str, dict[str, list[float]]] = {}
    print("| tokens per pack | rule | AP50 | steps |\n| ---: | --- | ---: | ---: |")
    for max_tokens in PACKS:
        for rule in RULES if max_tokens != REFERENCE else RULES[:1]:
            values, steps = [], 0
            for seed in options.seeds:
                changes = changes_of(max_tokens, rule, options.scenes, REFERENCE)
                trainer_keys = "{max_duration: 1ep, eval_interval: 1ep, save_folder: null, progress_bar: false}"
                curve = train_head(
                    {**changes, "trainer": trainer_keys}, convergence.FOLDER / "data", steps=1, every=1, seed=seed
                )
                steps, ap50, _ = curve.points[-1]
                values.append(round(ap50, 4))
            found.setdefault(str(max_tokens), {})[rule] = values
            print(f"| {max_tokens} | {rule} | {', '.join(f'{value:.2f}' for value in values)} | {steps} |", flush=True)
    print(json.dumps({"ap50": found}))


if __name__ == "__main__":
    main()
