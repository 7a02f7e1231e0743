"""Evaluate a checkpoint: `composer recipe/eval.py YAML load_path=CHECKPOINT [key.sub=value ...]`; see --help."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.config import EvaluationConfig, RecipeConfig
from recipe.configure import as_saved, from_command_line, one_line_errors, parser_of
from recipe.console import setup_logging
from recipe.redact import redact
from recipe.upstream.trainer_section import view_trainer

if TYPE_CHECKING:
    from recipe.metrics.gather import Evaluation

log = logging.getLogger("recipe.eval")  # its __name__ is __main__

USAGE = "composer recipe/eval.py YAML load_path=CHECKPOINT [key.sub=value ...]"
EXAMPLES = """  composer recipe/eval.py runs/joint/config.yaml load_path=runs/joint/checkpoints/latest-rank0.pt
  composer recipe/eval.py runs/joint/config.yaml load_path=CHECKPOINT eval_loader.streams.main.split=test
  composer recipe/eval.py runs/joint/config.yaml load_path=CHECKPOINT evaluation.answers=null   # faster"""


def main(config: RecipeConfig) -> dict[str, float]:
    """Score `load_path` on the evaluation set.

    The scores are also written to `{run_folder}/eval.json`, with what names the checkpoint.
    The calibration of the scores, and their best threshold, are written to `{run_folder}/calibration.yaml`.
    """
    # Imported here because they take seconds: a mistake in the yaml is reported before.
    from composer import Evaluator, Trainer
    from composer.utils import dist

    from recipe.build import (
        build_all_callbacks,
        build_eval_data,
        build_model,
        build_retention,
        prepare_process,
        take_weights,
    )
    from recipe.callbacks.evaluation_parts import EvaluationParts, evaluation_of
    from recipe.callbacks.progress import describe_seconds, headline
    from recipe.callbacks.table import build_loggers
    from recipe.checkpoints.check import contents_sum, describe, manifest_at
    from recipe.checkpoints.resume import safe_loading, weights_keywords
    from recipe.checkpoints.weights import EVALUATED, trained_caption_length
    from recipe.data.evaluation import put_answered_first
    from recipe.data.split import evaluation_loader
    from recipe.data.stream import read_teachers
    from recipe.load import load_processor
    from recipe.metrics.categories import category_table
    from recipe.metrics.gather import UNDEFINED
    from recipe.optim.fsdp import build_parallelism

    view = view_trainer(config)
    prepare_process(config)
    longest = trained_caption_length(config.caption_decoder, config.load_path)
    processor = load_processor(config.model.pretrained_model_name_or_path)
    teachers = read_teachers(config.teachers, config.seed)
    model = build_model(config, processor, longest)
    eval_loader = build_eval_data(config, processor, model, teachers)
    put_answered_first(eval_loader, config.evaluation.answers)  # so that the images drawn are those of a run
    origin = describe(as_saved(config, longest, model.class_names), processor.tokenizer, model, base={})
    retention = build_retention(config, processor, model)
    callbacks = build_all_callbacks(config, processor.tokenizer, model.scope, retention=retention)
    start, _ = take_weights(model, weights_keywords(view, config.load_path, origin), config, origin)
    with safe_loading():
        trainer = Trainer(
            model=model,
            eval_dataloader=Evaluator(label="eval", dataloader=eval_loader),
            callbacks=callbacks,
            loggers=build_loggers(config.loggers, config.run_folder, view.progress_bar),
            seed=config.seed,
            **start,
            parallelism_config=build_parallelism(model.model, view.fsdp, view.precision, config.fsdp_version),
            precision=view.precision,
            progress_bar=False,  # see recipe.callbacks.progress
        )
    trainer.eval()
    scores = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    if dist.get_global_rank() == 0:
        (parts,) = (callback for callback in callbacks if isinstance(callback, EvaluationParts))
        report = parts.report
        manifest = manifest_at(str(config.load_path))
        found = {**scores, EVALUATED: None if manifest is None else contents_sum(manifest)}
        if report is not None:
            found["categories"] = report.to_json()
        Path(config.run_folder, "eval.json").write_text(json.dumps(found, indent=1) + "\n")
        names = ", ".join(evaluation_loader(config).streams)
        print(f"{eval_loader.num_samples} samples of {names}, checkpoint {redact(str(config.load_path))}")
        print(headline(scores))
        print(f"took {describe_seconds(parts.seconds)}")
        for name, value in scores.items():
            print(f"  {name:24} {'-' if value == UNDEFINED else format(value, '.4f')}")
        if report is not None:
            print(category_table(report))
            calibrate(evaluation_of(trainer.state), config.evaluation, config.run_folder)
    return scores


def calibrate(evaluated: "Evaluation", evaluation: EvaluationConfig, run_folder: str) -> None:
    """Write and print the calibration of the scores that were just evaluated; log a warning if there is none."""
    from recipe.metrics.calibration import (
        CALIBRATION_FILE,
        calibration_text,
        check_enough,
        detections_of_halves,
        find_calibration,
        write_calibration,
    )

    path = Path(run_folder, CALIBRATION_FILE)
    path.unlink(missing_ok=True)  # an earlier one may be of other weights
    try:
        halves = detections_of_halves(evaluated)
        check_enough(*halves)
        found = find_calibration(*halves, evaluation)
    except ValueError as error:
        log.warning("no %s is written: %s", CALIBRATION_FILE, error)
        return
    write_calibration(found, path)
    print(f"{path}:\n{calibration_text(found)}")


def run(config: RecipeConfig) -> None:
    """Judge what is left to judge, then evaluate."""
    if config.debug.check_shapes:
        from recipe.upstream.shape_checks import check_shapes

        check_shapes()
    from recipe.checks import check_libraries, check_machine

    check_libraries(config)
    check_machine(config, ("eval_loader",))
    main(config)


if __name__ == "__main__":
    setup_logging()
    with one_line_errors():
        command = parser_of(USAGE, "Score a checkpoint on the evaluation set and calibrate its scores.", EXAMPLES)
        run(from_command_line(command, sys.argv[1:], required=("load_path",))[0])
