"""Evaluate a checkpoint: `composer recipe/eval.py YAML load_path=CHECKPOINT [key.sub=value ...]`."""

import json
import logging
import sys
from pathlib import Path

from composer import Evaluator, Trainer
from composer.utils import dist, get_device, reproducibility

from recipe.build import build_encoder, build_model, load_processor
from recipe.callbacks.table import build_callbacks, build_loggers
from recipe.checkpoints.check import describe
from recipe.checkpoints.resume import safe_loading, weights_keywords
from recipe.checkpoints.weights import with_trained_caption_length
from recipe.checks import config_from_command_line
from recipe.config import RecipeConfig
from recipe.console import setup_logging
from recipe.data.loader import build_eval_loader
from recipe.data.stream import read_teachers
from recipe.metrics.calibration import (
    CALIBRATION_FILE,
    calibration_text,
    detections_of_halves,
    find_calibration,
    write_calibration,
)
from recipe.metrics.gather import MetricEntry
from recipe.optim.fsdp import build_parallelism
from recipe.upstream.agreement import DIST_TIMEOUT
from recipe.upstream.shared_memory import clean_dead_shared_memory

log = logging.getLogger("recipe.eval")  # its __name__ is __main__


def main(config: RecipeConfig) -> dict[str, float]:
    """Scores `load_path` on the evaluation set; the scores also go to `{run_folder}/eval.json`.

    How scores are to be calibrated, and from which up objects are to be taken, goes to `{run_folder}/calibration.yaml`.
    """
    dist.initialize_dist(get_device(), config.trainer.get("dist_timeout", DIST_TIMEOUT))
    if dist.get_local_rank() == 0:
        clean_dead_shared_memory()
    reproducibility.seed_all(config.seed)
    config = with_trained_caption_length(config, config.load_path)
    processor = load_processor(config)
    teachers = read_teachers(config.teachers, config.seed)
    eval_loader = build_eval_loader(config, build_encoder(config, processor, keep_image=True), teachers)
    model = build_model(config, processor)
    start = weights_keywords(config, describe(config, processor.tokenizer, model))
    with safe_loading():
        trainer = Trainer(
            model=model,
            eval_dataloader=Evaluator(label="eval", dataloader=eval_loader),
            callbacks=build_callbacks(config, processor.tokenizer),
            loggers=build_loggers(config),
            seed=config.seed,
            **start,
            parallelism_config=build_parallelism(model, config.trainer, config.fsdp_version),
            precision=config.trainer.get("precision"),
            progress_bar=config.trainer.get("progress_bar", True),
        )
    trainer.eval()
    scores = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    if dist.get_global_rank() == 0:
        Path(config.run_folder, "eval.json").write_text(json.dumps(scores, indent=1) + "\n")
        for name, value in scores.items():
            print(f"{name:24} {value:.4f}")
        calibrate(trainer, config)
    return scores


def calibrate(trainer: Trainer, config: RecipeConfig) -> None:
    """Writes and prints the calibration of the scores that were just evaluated; a warning where there is none."""
    path = Path(config.run_folder, CALIBRATION_FILE)
    path.unlink(missing_ok=True)  # an earlier one may be of other weights
    entry = next(iter(trainer.state.eval_metrics["eval"].values()))
    assert isinstance(entry, MetricEntry)
    try:
        found = find_calibration(*detections_of_halves(entry.source), config.evaluation)
    except ValueError as error:
        log.warning("no %s is written: %s", CALIBRATION_FILE, error)
        return
    write_calibration(found, path)
    print(f"{path}:\n{calibration_text(found)}")


if __name__ == "__main__":
    setup_logging()
    main(config_from_command_line(sys.argv[1:], required=("load_path",)))
