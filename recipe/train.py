"""Train: `composer recipe/train.py YAML [key.sub=value ...]`."""

import logging
import sys
from functools import partial
from pathlib import Path

from composer import Evaluator, Trainer
from composer.utils import dist, get_device, reproducibility

from recipe.algorithms.nan_rollback import DIVERGED, TrainingDiverged
from recipe.build import build_algorithms, build_encoder, build_model, load_processor, with_caption_length
from recipe.callbacks.table import build_callbacks, build_loggers, build_savers
from recipe.checkpoints.check import describe
from recipe.checkpoints.resume import is_finished, load_keywords, safe_loading
from recipe.checkpoints.save import without_saving
from recipe.checkpoints.sigterm import exit_on_sigterm, ignore_sigterm
from recipe.checks import config_from_command_line
from recipe.config import RecipeConfig
from recipe.configure import save_config
from recipe.console import setup_logging
from recipe.data.loader import build_eval_loader, build_train_loader, device_batch_size, tokens_per_batch, uses_fsdp
from recipe.data.stream import read_teachers
from recipe.losses.counts import split_batch
from recipe.optim.fsdp import build_parallelism
from recipe.optim.groups import build_optimizer
from recipe.optim.schedule import build_curve
from recipe.upstream.agreement import DIST_TIMEOUT
from recipe.upstream.composer_state import restore_random_states
from recipe.upstream.shared_memory import clean_dead_shared_memory

log = logging.getLogger("recipe.train")  # its __name__ is __main__


def main(config: RecipeConfig) -> Trainer:
    """Trains as configured and returns the trainer, its state that of the last step."""
    dist.initialize_dist(get_device(), config.trainer.get("dist_timeout", DIST_TIMEOUT))
    if dist.get_local_rank() == 0:
        clean_dead_shared_memory()
    reproducibility.seed_all(config.seed)
    processor = load_processor(config)
    config = with_caption_length(config, processor.tokenizer)
    teachers = read_teachers(config.teachers, config.seed)
    model = build_model(config, processor)
    origin = describe(config, processor.tokenizer, model)
    start = load_keywords(config, origin)
    microbatch_size = config.trainer.get("device_train_microbatch_size") or device_batch_size(config.train_loader)
    split = partial(split_batch, equally_many=uses_fsdp(config))
    train_loader = build_train_loader(config, build_encoder(config, processor), teachers, microbatch_size, split)
    eval_loader = build_eval_loader(config, build_encoder(config, processor, keep_image=True), teachers)
    with safe_loading():
        trainer = Trainer(
            model=model,
            train_dataloader=train_loader,
            eval_dataloader=Evaluator(label="eval", dataloader=eval_loader),
            optimizers=build_optimizer(model, config.optimizer, tokens_per_batch(config, train_loader)),
            schedulers=build_curve(config.scheduler),
            algorithms=build_algorithms(config),
            callbacks=[*build_callbacks(config, processor.tokenizer), *build_savers(config, origin)],
            loggers=build_loggers(config),
            seed=config.seed,
            accumulate_train_batch_on_tokens=True,  # see recipe.data.loader.get_num_tokens_in_batch
            **{
                **without_saving(config.trainer),
                **start,
                "parallelism_config": build_parallelism(model, config.trainer, config.fsdp_version),
            },
        )
    if dist.get_global_rank() == 0:  # not before the checkpoint has been found to fit
        save_config(config, Path(config.run_folder, "config.yaml"))
    if not is_finished(trainer):
        restore_random_states(trainer)
        trainer.fit()
    return trainer


if __name__ == "__main__":
    setup_logging()
    exit_on_sigterm()
    try:
        main(config_from_command_line(sys.argv[1:]))
    except TrainingDiverged as error:
        ignore_sigterm()
        log.error("%s", error)
        sys.exit(DIVERGED)
