"""Train: `composer recipe/train.py YAML [key.sub=value ...]`; see --help."""

import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.config import RecipeConfig
from recipe.configure import as_saved, from_command_line, one_line_errors, parser_of, save_config
from recipe.console import setup_logging
from recipe.upstream.trainer_section import view_trainer

if TYPE_CHECKING:
    from composer import Trainer

    from recipe.checkpoints.save import CheckpointSaver

log = logging.getLogger("recipe.train")  # its __name__ is __main__

USAGE = "composer recipe/train.py YAML [key.sub=value ...]"
EXAMPLES = """  composer recipe/train.py yamls/quickstart.yaml
  composer recipe/train.py yamls/joint.yaml train_loader.streams.main.local=DATA eval_loader.streams.main.local=DATA
  composer -n 1 recipe/train.py yamls/joint.yaml trainer.precision=fp32 trainer.parallelism_config=null   # on a CPU
  The same command resumes the run from its newest checkpoint."""


def main(config: RecipeConfig) -> "Trainer":
    """Train as configured and return the trainer, its state that of the last step."""
    # Imported here because they take seconds: a mistake in the yaml is reported before.
    import torch
    from composer import Evaluator, Trainer

    from recipe.build import (
        build_algorithms,
        build_all_callbacks,
        build_eval_data,
        build_model,
        build_retention,
        build_run_callbacks,
        build_train_data,
        caption_length,
        prepare_process,
        take_weights,
    )
    from recipe.callbacks.table import build_loggers
    from recipe.checkpoints.base import base_weights
    from recipe.checkpoints.check import describe
    from recipe.checkpoints.lock import OneRunPerFolder
    from recipe.checkpoints.resume import catch_up, check_data, load_keywords, safe_loading
    from recipe.checkpoints.save import build_saver, without_saving
    from recipe.data.evaluation import put_answered_first
    from recipe.data.loader import tokens_per_batch
    from recipe.data.stream import read_teachers
    from recipe.load import load_processor
    from recipe.optim.fsdp import build_parallelism, fill_unit_by_unit
    from recipe.optim.groups import build_optimizer
    from recipe.optim.schedule import build_curve
    from recipe.upstream.composer_state import restore_random_states
    from recipe.upstream.heap import give_back_freed_blocks

    view = view_trainer(config)
    prepare_process(config)
    lock = OneRunPerFolder(config.run_folder)

    processor = load_processor(config.model.pretrained_model_name_or_path)
    tokenizer = processor.tokenizer
    longest = caption_length(config, tokenizer)
    teachers = read_teachers(config.teachers, config.seed)
    model = build_model(config, processor, longest)
    give_back_freed_blocks(model)
    origin = describe(as_saved(config, longest, model.class_names), tokenizer, model, base_weights(model.model, config))
    start = load_keywords(view, config.load_path, config.autoresume, origin)
    start, origin = take_weights(model, start, config, origin)
    if view.is_sharded:
        fill_unit_by_unit(model.model, model.model.vlm, getattr(torch, config.model.dtype))

    train_loader = build_train_data(config, processor, model, teachers)
    eval_loader = build_eval_data(config, processor, model, teachers)
    check_data(start, train_loader)
    num_batches = view.keywords.get("eval_subset_num_batches")
    last_answered = put_answered_first(eval_loader, config.evaluation.answers, num_batches)

    retention = build_retention(config, processor, model)
    saver = build_saver(view, config.save_best, origin)
    with safe_loading():
        trainer = Trainer(
            model=model,
            train_dataloader=train_loader,
            eval_dataloader=Evaluator(label="eval", dataloader=eval_loader),
            optimizers=build_optimizer(
                model, config.optimizer, lambda: tokens_per_batch(config.train_loader, train_loader)
            ),
            schedulers=build_curve(config.scheduler),
            algorithms=build_algorithms(config),
            # The savers come after all whose state is saved.
            callbacks=[
                *build_all_callbacks(config, tokenizer, model.scope, last_answered, retention),
                lock,
                *build_run_callbacks(config, saver),
            ],
            loggers=build_loggers(config.loggers, config.run_folder, view.progress_bar),
            seed=config.seed,
            accumulate_train_batch_on_tokens=True,  # see recipe.data.loader.get_num_tokens_in_batch
            **{
                **without_saving(view.keywords),
                **start,
                "progress_bar": False,  # see recipe.callbacks.progress
                "parallelism_config": build_parallelism(model.model, view.fsdp, view.precision, config.fsdp_version),
            },
        )
    restore_random_states(trainer)  # an evaluation that is repeated may save the checkpoint again, with these
    catch_up(trainer, saver, start)
    path = Path(config.run_folder, "config.yaml")
    fit(trainer, saver, partial(save_config, config, path, longest, model.class_names))
    return trainer


def fit(trainer: "Trainer", saver: "CheckpointSaver | None", write_config: Callable[[], None]) -> None:
    """Train to the end, unless it is reached; `write_config` writes the run's config.yaml, on rank 0."""
    from composer.utils import dist

    from recipe.checkpoints.resume import is_finished
    from recipe.upstream.composer_state import restore_random_states

    if is_finished(trainer):  # the file stays as it is
        return
    if dist.get_global_rank() == 0:
        write_config() if saver is None else saver.keep_config(write_config)
    restore_random_states(trainer)
    try:
        trainer.fit()
    except Exception:
        if saver is not None:
            saver.finish_uploads()
        raise


def run(config: RecipeConfig) -> None:
    """Judge what is left to judge, then train; a run that diverged ends with exit code 65, without a traceback."""
    if config.debug.check_shapes:
        from recipe.upstream.shape_checks import check_shapes

        check_shapes()
    import torch

    from recipe.algorithms.nan_rollback import DIVERGED, TrainingDiverged
    from recipe.checkpoints.sigterm import exit_on_sigterm, ignore_sigterm
    from recipe.checks import check_libraries, check_machine, check_retention

    exit_on_sigterm()
    check_libraries(config)
    check_retention(config)
    check_machine(config)
    try:
        main(config)
    except torch.OutOfMemoryError:
        from composer.utils import dist

        from recipe.estimate import GIB, advice

        card = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
        log.error("the GPU is out of memory: %s", advice(config, dist.get_world_size(), card))
        raise
    except TrainingDiverged as error:
        ignore_sigterm()
        log.error("%s", error)
        sys.exit(DIVERGED)


if __name__ == "__main__":
    setup_logging()
    with one_line_errors():
        run(from_command_line(parser_of(USAGE, "Train the model and its detection head.", EXAMPLES), sys.argv[1:])[0])
