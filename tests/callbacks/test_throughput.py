"""FLOPs, their share of the peak and the wait for the loader, in a real Trainer."""

import time
from collections.abc import Callable, Iterator

import pytest
from composer import Callback, DataSpec, Trainer
from composer.core import State
from composer.loggers import InMemoryLogger, Logger

from recipe.callbacks.throughput import PARTS, Throughput, step_flops
from recipe.config import OptimizerConfig, RecipeConfig
from recipe.data.loader import get_num_samples_in_batch, get_num_tokens_in_batch
from recipe.losses.counts import split_batch
from recipe.optim.groups import build_optimizer
from recipe.schema import Batch, Example
from tests.support.tiny_cases import make_model, microbatches_of

PEAK = 1e12


class SlowLoader:
    """Two batches, each waited for."""

    batch_size = 1

    def __init__(self, batches: list[list[Batch]], seconds: float):
        self.batches = batches
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Batch]]:
        for batch in self.batches:
            time.sleep(self.seconds)
            yield batch


class SlowStep(Callback):
    """Makes the step itself take a known time at least, and what stands between steps too."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def after_train_batch(self, state: State, logger: Logger) -> None:
        time.sleep(0.2)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        time.sleep(1.0)


def run(config: RecipeConfig, examples: list[Example], throughput: Throughput) -> tuple[InMemoryLogger, float]:
    model = make_model(config)
    batches = [microbatches_of(examples, "packed", 1) for _ in range(2)]
    memory = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(
            SlowLoader(batches, 0.3),
            split_batch=split_batch,
            get_num_samples_in_batch=get_num_samples_in_batch,
            get_num_tokens_in_batch=get_num_tokens_in_batch,
        ),
        optimizers=build_optimizer(model, OptimizerConfig(lr_vision=0.0)),
        callbacks=[throughput, SlowStep()],
        loggers=[memory],
        max_duration="2ba",
        device="cpu",
        device_train_microbatch_size=1,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
    )
    start = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - start
    trainer.close()
    return memory, seconds


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_what_is_logged(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], gradient_checkpointing: bool
) -> None:
    config = tiny_config(model={"gradient_checkpointing": gradient_checkpointing})
    examples = [tiny_examples["text"], tiny_examples["empty"]]
    memory, seconds = run(config, examples, Throughput("2ba", PEAK))
    logged = {name: float(rows[0][1]) for name, rows in memory.data.items() if len(rows) == 1}
    batches = microbatches_of(examples, "packed", 1)
    network = make_model(config).model
    flops = step_flops(network, batches, {"merger", "llm", "adapter", "detection"})
    assert [logged[f"flops/step/{part}"] for part in PARTS] == [flops.model[part] for part in PARTS]
    step = sum(flops.model[part] for part in PARTS)
    measured = 2 * step / logged["flops/per_second"]
    assert 2 * (0.3 + 0.2) <= measured <= seconds - 2 * 1.0  # saving between the steps is no part of them
    assert logged["data/stall_share"] == pytest.approx(0.6 / measured, rel=0.2)
    assert logged["mfu"] == pytest.approx(2 * step / measured / PEAK)
    hardware = flops.model.total() + flops.recompute.total()
    assert logged["flops/hardware_per_second"] == pytest.approx(2 * hardware / measured)
    of_logits = sum(2 * len(batch["labels"]) for batch in batches) * network.vlm.hf_model.lm_head.weight.numel()
    assert (hardware > step + of_logits) == gradient_checkpointing


def test_no_share_of_an_unknown_peak(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
) -> None:
    memory, _ = run(tiny_config(), [tiny_examples["text"]], Throughput("1ba"))
    assert len(memory.data["flops/per_second"]) == 2 and "mfu" not in memory.data
