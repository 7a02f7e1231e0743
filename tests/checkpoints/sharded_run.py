"""A tiny FSDP2 run with sharded checkpoints: `composer -n N sharded_run.py OUT STEPS [ADDRESS] [--nodes]`.

It resumes from the newest valid checkpoint in OUT/checkpoints, or below an address; whole weights go to OUT/weights.pt.
With `--nodes` each rank takes itself for a machine.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State, Trainer
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from torch.utils.data import DataLoader

from recipe.checkpoints import upload
from recipe.checkpoints.download import remove_download
from recipe.checkpoints.resume import EXCLUDED_ALGORITHMS, load_keywords, safe_loading
from recipe.checkpoints.sigterm import Preemption
from recipe.config import RecipeConfig
from recipe.upstream.trainer_section import view_trainer
from tests.checkpoints.checkpoint_cases import ORIGIN, TinyModel, make_saver
from tests.distributed.fsdp_shim import install
from tests.launches.launch import leave


class Measure(Callback):
    """Pretends that an evaluation found the second batch to be the best."""

    def batch_end(self, state: State, logger: Logger) -> None:
        state.eval_metric_values["score"] = -abs(float(state.timestamp.batch) - 2)
        for callback in state.callbacks:
            if callback is not self:
                callback.eval_after_all(state, logger)


def main() -> None:
    """Trains; one step is four samples over all ranks."""
    out, steps, *more = sys.argv[1:]
    dist.initialize_dist("cpu")
    if "--nodes" in more:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": os.environ["RANK"]}
    install()
    # No process imports torch again.
    upload.upload_process = lambda: ThreadPoolExecutor(1)  # pyright: ignore[reportAttributeAccessIssue]
    folder = next((argument for argument in more if "://" in argument), f"{out}/checkpoints")
    fsdp: dict[str, Any] = {"state_dict_type": "sharded"}
    view = view_trainer(RecipeConfig(trainer={"save_folder": folder, "parallelism_config": {"fsdp": fsdp}}))
    start = load_keywords(view, None, autoresume=True, origin=ORIGIN)
    if dist.get_global_rank() == 0:
        print(f"starts from {start['load_path']}")
    torch.manual_seed(0)
    model = TinyModel()
    samples = [torch.full((4,), float(i)) for i in range(8)]
    dataset: Any = samples  # any sequence will do
    loader = DataLoader(dataset, batch_size=4 // dist.get_world_size(), sampler=dist.get_sampler(dataset))
    saver = make_saver(folder, metric="eval/score", num_checkpoints_to_keep=3)
    with safe_loading():
        trainer = Trainer(
            model=model,
            train_dataloader=loader,
            optimizers=torch.optim.AdamW(model.parameters(), 0.1),
            callbacks=[Measure(), saver, Preemption(saver)],
            max_duration=f"{steps}ba",
            load_path=start["load_path"],
            load_exclude_algorithms=list(EXCLUDED_ALGORITHMS),
            parallelism_config={"fsdp": FSDP2Config(**fsdp)},
            progress_bar=False,
            auto_log_hparams=False,
        )
    if start["load_path"] is not None:
        remove_download(start["load_path"])
    trainer.fit()
    weights = {name: value.full_tensor() for name, value in trainer.state.model.state_dict().items()}
    if dist.get_global_rank() == 0:
        torch.save(weights, Path(out, "weights.pt"))
    trainer.close()
    leave()


if __name__ == "__main__":
    main()
