"""Measure what the guard, the group metrics and the snapshot cost in a training step, next to Composer's monitors.

    python tests/benchmarks/overhead.py [--steps 12] [--threads 1] [--hidden-size 512] [--num-layers 8]

There is one run of Composer's Trainer: packed synthetic scenes, the tiny model widened to some 45 million parameters,
three microbatches of at most 512 tokens per step. A guard or monitor has a cost per parameter (and a little per
microbatch), the step a cost per parameter and token. So the share of a guard or monitor shrinks as the batch grows, and
a small batch is taken here.

Everything measured is attached to the same run and works at every other step. The hooks themselves are timed, and
divided by the step without them. The share of what works at intervals is that of its default interval. No logger is
attached, so nobody pays for writing: OptimizerMonitor has some 2,000 numbers per measurement, the recipe some 20.
A hook on CUDA is timed between synchronisations, which hides what it would have overlapped and shows what it waits for.
On the CPU nobody pays for launches and waiting, of which OptimizerMonitor has one per number, the recipe one per step.

guard       all hooks of NaNRollback, those in the backward pass too, but for clipping and the snapshot.
            `backward` is the part in the backward pass.
clip        the guard's multiplication of the gradients. Listed apart, since it replaces Composer's GradientClipping,
            which a run with Composer's monitors has in addition.
snapshot    check of the weights and copy; every 50 steps. `copy` is the copy alone.
metrics     GroupMetrics; every 10 steps.
gradients   OptimizerMonitor as it works with torch's AdamW: norms of gradients.
optimizer   OptimizerMonitor with the report of DecoupledAdamW (lent to the recipe's AdamW): norms of gradients,
            weights, updates and moments, which guard and metrics together show by group, but for the moments.

The last line is JSON. `metrics_over_optimizer_monitor`: (guard + one measurement of metrics) over (NaNMonitor + one
measurement of optimizer), both showing all at every step. The recipe's defaults show gradient norms at every step and
the others every 10. OptimizerMonitor has one interval for all, so to show as much it must work at every step:
`defaults_over_optimizer_monitor_every_step`. More ratios are printed above.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import MethodType
from typing import Any

import torch
from composer import Algorithm, Callback, Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import NaNMonitor, OptimizerMonitor
from composer.core import Event, State
from composer.loggers import Logger
from composer.optim import DecoupledAdamW

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.algorithms.nan_rollback import NaNRollback
from recipe.algorithms.watch import MicrobatchFlags
from recipe.build import build_algorithms, build_model
from recipe.callbacks.measures import GroupMetrics, LossShares, every_batches
from recipe.callbacks.throughput import Throughput
from recipe.config import DetectionHeadConfig, LoaderConfig, ModelConfig, NaNRollbackConfig, PackingConfig, RecipeConfig
from recipe.data.loader import build_train_loader, get_num_tokens_in_batch
from recipe.load import build_encoder, load_processor
from recipe.losses.counts import split_batch
from recipe.optim.groups import build_optimizer
from recipe.optim.schedule import build_curve
from recipe.tiny import build_tiny_checkpoint

PACKS, PACK_TOKENS = 3, 512  # of a step
WARM_UP = 4  # steps
NEVER = 1e30  # a norm that no gradient reaches: GradientClipping multiplies all the same, by 1

Row = dict[str, float]


class Stopwatch(Callback):
    """Times watched methods within each step, and the step; must be the first of the callbacks.

    Attributes:
        works: Whether what is watched works in this step.
        rows: Of each step that is over: `step`, `works`, `tokens`, and the seconds of each watched name.
    """

    def __init__(self):
        self.works = True
        self.rows: list[Row] = []
        self._spent: Row = defaultdict(float)
        self._start = 0.0

    def watch(self, owner: Any, method: str, name: str, idle: Callable[[], Any] | None = None) -> None:
        """Time a method under a name; if the watched things rest, call `idle` in its place."""
        inner = getattr(owner, method)

        def timed(*args: Any, **keywords: Any) -> Any:
            if idle is not None and not self.works:
                return idle()
            start = now()
            try:
                return inner(*args, **keywords)
            finally:
                self._spent[name] += now() - start

        setattr(owner, method, timed)

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Begin a step."""
        self.works = not self.works
        self._spent.clear()
        self._spent["tokens"] = get_num_tokens_in_batch(state.batch)["total"]
        self._start = now()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """End the step: this event follows the batch's end."""
        self.rows.append({**self._spent, "step": now() - self._start, "works": self.works})


def now() -> float:
    """Return seconds once a GPU is done with its work; on the CPU core-seconds, which other work leaves alone."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def make_config(folder: Path, num_steps: int, hidden_size: int, num_layers: int) -> RecipeConfig:
    """Return a run on scenes of its own, everything measured at every step."""
    build_tiny_checkpoint(
        str(folder / "tiny"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        vision_hidden_size=hidden_size // 2,
        vision_depth=num_layers // 2,
    )
    samples = iter_samples(num_samples=6 * PACKS * num_steps, seed=0, image_size=140)
    write_split(samples, str(folder / "data"), "train")
    loader = LoaderConfig(
        streams={"shapes": {"local": str(folder / "data"), "split": "train"}},
        global_batch_size=PACKS,
        collator="packed",
        packing=PackingConfig(max_tokens=PACK_TOKENS),
        dataset={"num_canonical_nodes": 1},
    )
    return RecipeConfig(
        run_folder=str(folder / "run"),
        model=ModelConfig(pretrained_model_name_or_path=str(folder / "tiny"), dtype="float32"),
        detection_head=DetectionHeadConfig(width=256, num_layers=6),
        train_loader=loader,
        nan_rollback=NaNRollbackConfig(snapshot_interval="1ba"),
        trainer={"max_duration": f"{num_steps}ba"},
    )


def watch_guard(stopwatch: Stopwatch, guard: NaNRollback) -> None:
    """Watch the guard: `guard` is the whole of it; the other names are parts."""
    stopwatch.watch(guard, "_clip", "clip")
    stopwatch.watch(guard, "_end_batch", "snapshot")
    handlers: dict[Event, Any] = {**guard._HANDLERS, Event.BATCH_END: lambda _, *args: guard._end_batch(*args)}
    vars(guard)["_HANDLERS"] = handlers  # which hold functions of the class, not what is watched
    stopwatch.watch(guard.snapshot, "take", "copy")
    stopwatch.watch(MicrobatchFlags, "_keep_gradient", "backward")
    watch_algorithm(stopwatch, guard, "guard")


def watch_algorithm(stopwatch: Stopwatch, algorithm: Algorithm, name: str) -> None:
    """Watch both methods that the engine calls."""
    stopwatch.watch(algorithm, "match", name, idle=lambda: False)
    stopwatch.watch(algorithm, "apply", name)


def train(config: RecipeConfig) -> tuple[list[Row], Trainer, float]:
    """Train as `recipe.train` does; return the steps, the trainer, and the bytes of a snapshot."""
    processor = load_processor(config.model.pretrained_model_name_or_path)
    model = build_model(config, processor)
    optimizer = build_optimizer(model, config.optimizer)
    reporting: Any = optimizer  # OptimizerMonitor asks for a report that torch's own AdamW cannot give
    reporting.metric_functions = DecoupledAdamW.metric_functions
    reporting.report_per_parameter_metrics = MethodType(DecoupledAdamW.report_per_parameter_metrics, optimizer)
    *algorithms, guard = build_algorithms(config)
    assert isinstance(guard, NaNRollback)
    clipping = GradientClipping("norm", NEVER)
    callbacks: dict[str, Callback] = {
        "metrics": GroupMetrics("1ba"),
        "loss shares": LossShares(),
        "throughput": Throughput(peak_flops_per_second=1e12),
        "NaN monitor": NaNMonitor(),
        "gradients": OptimizerMonitor(log_optimizer_metrics=False, batch_log_interval=1),
        "optimizer": OptimizerMonitor(batch_log_interval=1),
    }
    stopwatch = Stopwatch()
    watch_guard(stopwatch, guard)
    watch_algorithm(stopwatch, clipping, "Composer's clipping")
    for name, callback in callbacks.items():
        stopwatch.watch(callback, "run_event", name, idle=lambda: None)
    trainer = Trainer(
        model=model,
        train_dataloader=build_train_loader(
            config.train_loader,
            build_encoder(processor, model.model, config.image, config.prompt, config.max_seq_len),
            None,
            config.seed,
            microbatch_size=1,
            split_batch=split_batch,
        ),
        optimizers=optimizer,
        schedulers=build_curve(config.scheduler),
        algorithms=[*algorithms, clipping, guard],
        callbacks=[stopwatch, *callbacks.values()],
        seed=config.seed,
        accumulate_train_batch_on_tokens=True,
        device_train_microbatch_size=1,
        progress_bar=False,
        **config.trainer,
    )
    trainer.fit()
    trainer.close()
    num_bytes = sum(copy.numel() * copy.element_size() for copy in guard.snapshot._copies.values())
    return stopwatch.rows[WARM_UP:], trainer, num_bytes


def summarise(rows: list[Row]) -> tuple[Row, float]:
    """Return the median seconds of each name (guard without clipping and snapshot), and of the step without all."""
    working, resting = [row for row in rows if row["works"]], [row for row in rows if not row["works"]]
    whole = ("guard", "backward", "Composer's clipping", "metrics", "loss shares", "throughput")
    whole += ("NaN monitor", "gradients", "optimizer")
    for row in working:
        row["step"] -= sum(row[name] for name in whole)
        row["guard"] += row["backward"] - row["clip"] - row["snapshot"]
    seconds = {name: median(row[name] for row in working) for name in working[0]}
    bare = median(row["step"] for row in rows)
    rest = median(row["step"] for row in resting)
    print(
        f"{bare:.3f} s per step of {median(row['tokens'] for row in rows):.0f} tokens without what is measured: "
        f"{seconds['step']:.3f} s if it was measured and subtracted, {rest:.3f} s if all of it rested"
    )
    return seconds, bare


def shares(seconds: Row, bare: float) -> Row:
    """Print each cost, once and amortised over its default interval; return the shares of the step."""
    intervals = defaultdict(lambda: 1)
    intervals["metrics"] = GroupMetrics().num_batches
    intervals["snapshot"] = every_batches(NaNRollbackConfig().snapshot_interval)
    intervals["gradients"] = intervals["optimizer"] = OptimizerMonitor().batch_log_interval
    print("| what | ms, once | every, by default | share of the step | at every step |")
    print("| --- | ---: | ---: | ---: | ---: |")
    found = {}
    for name in seconds:
        if name not in ("step", "works", "tokens"):
            share = seconds[name] / bare
            found[name] = share / intervals[name]
            print(f"| {name} | {1e3 * seconds[name]:.1f} | {intervals[name]} | {found[name]:.3%} | {share:.3%} |")
    return found


def ratios(seconds: Row) -> Row:
    """Return ours over Composer's, in several ways."""
    guard, metrics, clip = (seconds[name] for name in ("guard", "metrics", "clip"))
    nan, gradients, optimizer = (seconds[name] for name in ("NaN monitor", "gradients", "optimizer"))
    often = GroupMetrics().num_batches
    ours, mixed = guard + metrics / often, nan + gradients + (optimizer - gradients) / often
    return {
        "all of both at every step": (guard + metrics) / (nan + optimizer),
        f"guard at every step, metrics every {often}; optimizer at every step": ours / (nan + optimizer),
        f"guard and gradients at every step, metrics and optimizer every {often}": ours / mixed,
        "the same, each with its clipping": (ours + clip) / (mixed + seconds["Composer's clipping"]),
        f"guard at every step, metrics every {often}; optimizer every {often}": ours / (nan + optimizer / often),
        "guard; NaN monitor and gradients; at every step": guard / (nan + gradients),
        "one measurement of metrics; one of optimizer": metrics / optimizer,
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="at which everything measured works; as many rest")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden-size", type=int, default=512, help="of the language model; the tower's is half of it")
    parser.add_argument("--num-layers", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), WARM_UP + 2 * args.steps, args.hidden_size, args.num_layers)
        rows, trainer, num_bytes = train(config)
    parameters = list(trainer.state.model.parameters())
    print(f"{sum(p.numel() for p in parameters) / 1e6:.1f} million parameters, {len(parameters)} tensors")
    seconds, bare = summarise(rows)
    found = shares(seconds, bare)
    print("ours over Composer's:")
    compared = ratios(seconds)
    over_all, over_every_step, *_ = compared.values()
    for name, ratio in compared.items():
        print(f"  {ratio:.2f} {name}")
    report = {
        "guard_share": found["guard"],
        "metrics_share": found["metrics"],
        "metrics_over_optimizer_monitor": over_all,
        "snapshot_seconds_per_gb": seconds["copy"] / (num_bytes / 1e9),
        "defaults_over_optimizer_monitor_every_step": over_every_step,
        "clip_share": found["clip"],
        "snapshot_share": found["snapshot"],
        "snapshot_gb": num_bytes / 1e9,
        "step_seconds": bare,
        "tokens": seconds["tokens"],
    }
    print(json.dumps({name: round(value, 5) for name, value in report.items()}))


if __name__ == "__main__":
    main()
