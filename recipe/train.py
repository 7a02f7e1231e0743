"""Train: `composer recipe/train.py YAML [key.sub=value ...]`."""

import sys
from pathlib import Path

from composer import Evaluator, Trainer
from composer.utils import dist, get_device, reproducibility

from recipe.build import build_encoder, build_model, load_processor
from recipe.callbacks.table import build_callbacks, build_loggers
from recipe.config import RecipeConfig, save_config
from recipe.config_checks import config_from_command_line
from recipe.data.agreement import DIST_TIMEOUT
from recipe.data.loader import build_eval_loader, build_train_loader, device_batch_size, tokens_per_batch
from recipe.data.stream import read_teachers
from recipe.logging_setup import setup_logging
from recipe.optim import build_algorithms, build_optimizer, build_scheduler
from recipe.shared_memory import clean_dead_shared_memory


def main(config: RecipeConfig) -> Trainer:
    """Trains as configured and returns the trainer, its state that of the last step."""
    dist.initialize_dist(get_device(), config.trainer.get("dist_timeout", DIST_TIMEOUT))
    if dist.get_local_rank() == 0:
        clean_dead_shared_memory()
    reproducibility.seed_all(config.seed)
    processor = load_processor(config)
    teachers = read_teachers(config.teachers, config.seed)
    model = build_model(config, processor)
    microbatch_size = config.trainer.get("device_train_microbatch_size") or device_batch_size(config.train_loader)
    train_loader = build_train_loader(config, build_encoder(config, processor), teachers, microbatch_size)
    eval_loader = build_eval_loader(config, build_encoder(config, processor, keep_image=True), teachers)
    trainer = Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=Evaluator(label="eval", dataloader=eval_loader),
        optimizers=build_optimizer(model, config.optimizer, tokens_per_batch(config, train_loader)),
        schedulers=build_scheduler(config.scheduler),
        algorithms=build_algorithms(config.optimizer),
        callbacks=build_callbacks(config, processor.tokenizer),
        loggers=build_loggers(config),
        seed=config.seed,
        load_path=config.load_path,
        accumulate_train_batch_on_tokens=True,  # see recipe.data.loader.get_num_tokens_in_batch
        **{"save_folder": f"{config.run_folder}/checkpoints", **config.trainer},
    )
    if dist.get_global_rank() == 0:  # not before the checkpoint has been found to fit
        save_config(config, Path(config.run_folder, "config.yaml"))
    trainer.fit()
    return trainer


if __name__ == "__main__":
    setup_logging()
    main(config_from_command_line(sys.argv[1:]))
