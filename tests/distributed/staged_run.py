"""Stages on two ranks: `composer -n 2 tests/distributed/staged_run.py TINY OUT MODE [lora]`.

MODE is ddp, fsdp1 or fsdp2; with `lora` the trunk has adapters, whose stages they are.

Every rank writes OUT/MODE-RANK.json: of each comparison of two runs, the parameters that differ in any bit.
"""

import json
import sys
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.utils import dist

from recipe.config import SchedulerConfig
from recipe.joint import JointModel
from tests.distributed.fsdp_shim import install
from tests.launches.launch import leave
from tests.support.staged_cases import (
    ADAPTED_RATES,
    MANY_STAGES,
    RATES,
    TWO_STAGES,
    Parts,
    adapted,
    by_hand,
    config_with,
    differing,
    make_steps,
    parts_of,
    train,
)
from tests.support.tiny_cases import ADAPTED, make_config, make_examples, make_model


def finish(trainer: Trainer) -> Parts:
    """What the run ends with."""
    parts = parts_of(trainer.state)
    trainer.close()
    return parts


def main() -> None:
    """Compares two stages with two runs, and resumed runs with one that was never stopped."""
    checkpoint, out, mode, *lora = sys.argv[1:]
    dist.initialize_dist("cpu")
    install()
    config = make_config(checkpoint, **(ADAPTED if lora else {}))
    two, many, rates = TWO_STAGES, MANY_STAGES, RATES
    if lora:
        two, many, rates = adapted(two), adapted(many), ADAPTED_RATES
    steps = make_steps(make_examples(config))

    def model() -> JointModel:
        return make_model(config)

    staged = finish(train(model(), steps, "2ep", config_with(two, rates=rates), mode=mode))
    found = {"by hand": differing(staged, by_hand(model(), model(), steps, mode, rates))}
    stages = config_with(many, SchedulerConfig("cosine", "2ba", 0.1), rates)
    folder = f"{out}/{mode}"
    saving: dict[str, Any] = {"save_folder": folder, "save_interval": "1ba", "save_filename": "ba{batch}.pt"}
    whole = finish(train(model(), steps, "2ep", stages, mode=mode, **saving))
    for batch in (3, 6):
        path = f"{folder}/ba{batch}.pt" if mode == "ddp" else f"{folder}/ep{batch // len(steps)}-ba{batch}"
        resumed = finish(train(model(), steps, "2ep", stages, mode=mode, load_path=path))
        found[f"resumed at {batch}"] = differing(resumed, whole)
    Path(out, f"{mode}-{dist.get_global_rank()}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
