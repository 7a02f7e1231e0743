"""Two steps with both: `composer -n N tests/distributed/group_metrics_run.py TINY OUT MODE`.

MODE is ddp, fsdp1, fsdp2, or on four ranks hybrid1 or hybrid2. Every rank writes OUT/MODE-RANK.pt: what was logged,
and the true norms from whole weights.
"""

import sys
from pathlib import Path

import torch
from composer import Callback, Logger, State, Trainer
from composer.core import DataSpec
from composer.loggers import InMemoryLogger
from composer.utils import dist
from torch import Tensor

from recipe.algorithms.staged_freezing import plain_name
from recipe.callbacks.measures import GroupMetrics, LossGradients
from recipe.config import OptimizerConfig
from recipe.data.loader import get_num_samples_in_batch, get_num_tokens_in_batch
from recipe.losses.counts import split_batch
from recipe.optim.groups import build_optimizer, group_of
from tests.distributed.fsdp_shim import install, parallelism_of
from tests.distributed.one_step import CASES, whole, whole_parameters
from tests.launches.launch import leave
from tests.support.float64 import compute_in_float64
from tests.support.tiny_cases import make_config, make_examples, make_model, microbatches_of

RATES = OptimizerConfig(lr_vision=1e-3, lr_merger=2e-3, lr_llm=0.0, lr_adapter=3e-3, lr_detection=4e-3)


class Truth(Callback):
    """Weight norm and update ratio of every group, from copies of the whole weights."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.norms: list[dict[str, float]] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        """Copies the weights."""
        self.before = weights(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Compares."""
        sums: dict[str, float] = {}
        for name, value in weights(state).items():
            group = group_of(name)
            for key, tensor in (("weight_norm", value), ("update_ratio", value - self.before[name])):
                sums[f"{key}/{group}"] = sums.get(f"{key}/{group}", 0.0) + float(tensor.double().square().sum())
        for key in [key for key in sums if key.startswith("update_ratio")]:
            sums[key] /= sums[key.replace("update_ratio", "weight_norm")]
        self.norms.append({key: value**0.5 for key, value in sums.items()})


def weights(state: State) -> dict[str, Tensor]:
    """A copy of every whole weight, by its plain name."""
    with whole_parameters(state.model):
        return {plain_name(name): whole(value.detach()).clone() for name, value in state.model.named_parameters()}


def main() -> None:
    """Trains and writes the record."""
    checkpoint, out, mode = sys.argv[1:]
    dist.initialize_dist("cpu")
    install()
    compute_in_float64()
    config = make_config(checkpoint)
    case = CASES["padded"]
    examples = make_examples(config)
    share = [examples[name] for name in case.shares_of(dist.get_world_size())[dist.get_global_rank()]]
    batches = [microbatches_of(share, case.layout, case.microbatch_size) for _ in range(2)]
    model = make_model(config)
    memory, truth = InMemoryLogger(), Truth()
    trainer = Trainer(
        model=model,
        parallelism_config=parallelism_of(model, mode),
        train_dataloader=DataSpec(
            batches,
            split_batch=split_batch,
            get_num_samples_in_batch=get_num_samples_in_batch,
            get_num_tokens_in_batch=get_num_tokens_in_batch,
        ),
        optimizers=build_optimizer(model, RATES),
        callbacks=[GroupMetrics("1ba"), LossGradients("1ba"), truth],
        loggers=[memory],
        max_duration="2ba",
        device="cpu",
        precision="fp32",
        device_train_microbatch_size=case.microbatch_size,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        seed=1,
    )
    trainer.fit()
    kinds = ("weight_norm", "update_ratio", "loss_gradient")
    logged = {key: [float(value) for _, value in rows] for key, rows in memory.data.items() if key.startswith(kinds)}
    torch.save({"logged": logged, "truth": truth.norms}, Path(out, f"{mode}-{dist.get_global_rank()}.pt"))
    leave()


if __name__ == "__main__":
    main()
