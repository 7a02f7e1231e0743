"""Run the whole of `recipe.train` in this process, for tests that need a genuine Composer checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.config import LoaderConfig
from recipe.train import main
from tests.support.tiny_cases import make_config


def train_tiny_run(checkpoint: str, folder: Path, steps: int = 2, **changes: Any) -> Path:
    """Train on four scenes in float32, evaluating after each step; return the Composer checkpoint.

    `changes` are those of `make_config`, callbacks or loggers. It saves after every second step; called again, the run
    resumes.
    """
    if not (folder / "data").exists():
        write_split(iter_samples(num_samples=4, seed=11, image_size=84), str(folder / "data"), "train")
    stream = {"shapes": {"local": str(folder / "data"), "split": "train"}}
    sections = {name: changes.pop(name) for name in ("callbacks", "loggers") if name in changes}
    config = replace(
        make_config(checkpoint, **{**changes, "model": {"dtype": "float32", **changes.get("model", {})}}),
        run_folder=str(folder / "run"),
        train_loader=LoaderConfig(streams=stream, global_batch_size=2),
        eval_loader=LoaderConfig(streams=stream, global_batch_size=4),
        **{"callbacks": {"speed_monitor": {}, "lr_monitor": {}}, **sections},
        trainer={"max_duration": f"{steps}ba", "eval_interval": "1ba", "save_interval": "2ba", "progress_bar": False},
    )
    main(config).close()
    return folder / "run" / "checkpoints" / "latest-rank0.pt"
