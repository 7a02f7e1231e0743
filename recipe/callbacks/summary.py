"""What a run says on the console first and last: its plan, with warnings if it will teach little, and what it did."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from composer import Callback
from composer.core import State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DataLoader

from recipe.callbacks.memory import MemoryPeaks
from recipe.callbacks.progress import headline, scores_of, short
from recipe.config import SchedulerConfig
from recipe.data.contents import EpochContents, epoch_contents
from recipe.data.stream import PackStream
from recipe.optim.groups import num_parameters
from recipe.optim.schedule import RunStage, Schedule, long_warmups, run_stages

log = logging.getLogger(__name__)

FEW_STEPS = 500  # fewer teach a new head little
OFTEN = 200  # passes over a set, after which it is learned by heart
PEAK_MEMORY = "memory/peak_gib"  # of the process or GPU that took most, logged when a run ends


class Summary(Callback):
    """Logs what a run is about to do, and what it did in six lines.

    Args:
        run_folder: Where the run writes.
        save_folder: Where checkpoints go; None: none are saved.
        eval_interval: As configured: a duration, or a number of epochs.
        scheduler: Warm-ups that are longer than the run are reported.
        schedule: Says in which steps each group learns; without `trunk`, all epochs have answers or none has.
    """

    def __init__(
        self,
        run_folder: str,
        save_folder: str | None,
        eval_interval: str | int,
        scheduler: SchedulerConfig,
        schedule: Schedule,
    ):
        self.scheduler = scheduler
        self.schedule = schedule
        self.run_folder = run_folder
        self.save_folder = save_folder
        self.eval_interval = eval_interval if isinstance(eval_interval, str) else f"{eval_interval}ep"
        self._start = (0, 0.0)  # step and time
        self._memory = MemoryPeaks()

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note where a stage begins, for its peak of memory."""
        self._memory.batch_start(state)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Log the plan of the run and warnings. Collective under FSDP."""
        self._start = (int(state.timestamp.batch), time.monotonic())
        sizes, num_others = num_parameters(state)
        if dist.get_global_rank() == 0:
            self._log_plan(state, sizes, num_others)

    def _log_plan(self, state: State, sizes: dict[str, int], num_others: int) -> None:
        loader, duration, begun = state.train_dataloader, state.max_duration, int(state.timestamp.batch)
        assert isinstance(loader, DataLoader) and isinstance(loader.dataset, PackStream) and duration is not None
        dataset, processes = loader.dataset, dist.get_world_size()
        contents = epoch_contents(dataset, int(state.timestamp.epoch))
        per_epoch = int(state.dataloader_len or 0)
        step_packs = (loader.batch_size or 1) * processes
        step_tokens = None if contents.tokens_per_pack is None else contents.tokens_per_pack * step_packs
        lengths = {TimeUnit.BATCH: 1.0, TimeUnit.EPOCH: float(per_epoch), TimeUnit.SAMPLE: 1 / step_packs}
        if step_tokens is not None:
            lengths[TimeUnit.TOKEN] = 1 / step_tokens
        length = lengths.get(duration.unit)  # unknown if the run's duration is in seconds
        steps = int(duration.value * length) if length else None
        rates = {group["name"]: group["initial_lr"] for group in state.optimizers[0].param_groups}
        stages = run_stages(self.schedule, list(rates), steps, lengths) if steps else None
        # Epochs with answers have other lengths than those without, and epochs of parts than those of whole images.
        varies = self._answers_vary() or parts_end(dataset)
        about = "about " if varies and duration.unit != TimeUnit.BATCH else ""
        if not self._answers_vary():
            contents = replace(contents, tokens_otherwise=None)
        learned = None
        if stages and "detection" in rates:
            learned = sum(stage.steps for stage in stages if stage.factors.get("detection"))
        seen = (
            {name: passes * steps / per_epoch for name, passes in contents.passes.items()}
            if steps and per_epoch
            else {}
        )
        groups = ", ".join(f"{name} {short(size)} at {rates[name]:g}" for name, size in sizes.items())
        trained = sum(sizes.values())
        each = f"{processes} processes" if processes > 1 else "1 process"
        checkpoints = "no checkpoints" if self.save_folder is None else f"checkpoints in {self.save_folder}"
        lines = [
            f"  data        {describe_data(contents)}",
            f"  epoch       {describe_epoch(contents, dataset.with_answers)}, {per_epoch} steps",
            f"  a step      {step_packs} {unit_of(contents)}"
            + ("" if step_tokens is None else f", {short(step_tokens)} tokens"),
            f"  steps       {duration}"
            + (f" = {about}{steps} steps" if steps else "")
            + ("" if learned is None else f", the head learns in {about}{learned}")
            + (f", resumed at step {begun}" if begun else "")
            + f"; evaluation every {self.eval_interval}",
            *([f"  seen        each image {describe_seen(seen, contents)}"] if seen else []),
            *([f"  stages      {describe_stages(stages)}"] if stages and len(stages) > 1 else []),
            f"  trains      {groups}; {short(trained)} of {short(trained + num_others)} parameters",
            f"  runs on     {each}, {state.device.name}, {state.precision.value}",
            f"  writes      {self.run_folder}: config.yaml, metrics.jsonl, images; {checkpoints}",
        ]
        log.info("this run\n%s", "\n".join(lines))
        self._warn(duration, per_epoch, learned, seen)

    def _warn(self, duration: Time, per_epoch: int, learned: int | None, seen: dict[str, float]) -> None:
        for warmup in long_warmups(self.scheduler, duration, per_epoch):
            log.warning("%s is longer than the run, %s: the full rate is never reached; shorten it", warmup, duration)
        if learned is not None and learned < FEW_STEPS:
            log.warning(
                "the head learns in %d steps, a new one needs %d or more: raise trainer.max_duration or lower "
                "train_loader.global_batch_size",
                learned,
                FEW_STEPS,
            )
        for name, times in seen.items():
            if times > OFTEN:
                log.warning(
                    "each sample of train_loader.streams.%s is seen %.0f times, more than %d teaches little more: "
                    "lower trainer.max_duration or its repeat or proportion, or convert more images",
                    *(name, times, OFTEN),
                )

    def _answers_vary(self) -> bool:
        """Return whether some epochs may read answers and others not."""
        trunk = [self.schedule.stages.get(group, ()) for group in self.schedule.trunk]
        return bool(trunk) and all(any(stage.factor is None for stage in stages) for stages in trunk)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log the last lines, and the peak of memory as a metric. Collective."""
        peaks = self._memory.largest(state)
        logger.log_metrics({PEAK_MEMORY: float(peaks.max())})
        if dist.get_global_rank() != 0:
            return
        step, start = self._start
        done, seconds = int(state.timestamp.batch) - step, time.monotonic() - start
        pace = f" ({seconds / done:.3g} s per step)" if done else ""
        newest = "none saved" if self.save_folder is None else f"{self.save_folder}/latest-rank0.pt"
        scores = scores_of(state)
        lines = [
            f"  done        step {int(state.timestamp.batch)} after {timedelta(seconds=round(seconds))}{pace}",
            f"  evaluation  {headline(scores) if scores else 'none yet'}",
            f"  memory      {self._memory.describe(peaks)}",
            f"  checkpoint  {newest}",
            f"  results     {self.run_folder}: metrics.jsonl, curves.png, images, config.yaml",
            f"  next        python recipe/predict.py --checkpoint {newest} --out predictions IMAGES",
        ]
        log.info("this run has ended\n%s", "\n".join(lines[: 5 if self.save_folder is None else 6]))


def parts_end(dataset: PackStream) -> bool:
    """Return whether later epochs show whole images instead of parts, so that they differ in length."""
    augmentation = dataset.maker.augmentation
    crop = None if augmentation is None else augmentation.config.crop
    return crop is not None and crop.epochs is not None


def unit_of(contents: EpochContents) -> str:
    """Return what a step counts; without packing each sample is alone."""
    return "samples" if contents.num_packs == contents.num_samples else "packs"


def describe_data(contents: EpochContents) -> str:
    """Return what is stored, such as `76 images, 310 objects, 76 samples`."""
    parts = [f"{contents.num_stored} samples"]
    if contents.num_objects is not None:
        parts.insert(0, f"{contents.num_objects} objects")
    if contents.num_images is not None:
        parts.insert(0, f"{contents.num_images} images")
    return ", ".join(parts)


def describe_epoch(contents: EpochContents, with_answers: bool) -> str:
    """Return what an epoch reads; the tokens of the other kind of epoch too, if the run has both."""
    tokens, other = contents.tokens, contents.tokens_otherwise
    text = "tokens unknown, as there are no records" if tokens is None else f"{short(tokens)} tokens"
    if other is not None and other != tokens:
        kind = "without" if with_answers else "with"
        text += f" ({short(other)} in those {kind} answers)"
    packs = f" in {contents.num_packs} packs" if unit_of(contents) == "packs" else ""
    return f"{contents.num_samples} samples{packs}, {text}"


def describe_seen(seen: dict[str, float], contents: EpochContents) -> str:
    """Return how often an image is seen; by stream if they differ."""
    texts = {name: f"{times * contents.samples_per_image:.3g} times" for name, times in seen.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} in {name}" for name, text in texts.items())


def describe_stages(stages: Sequence[RunStage]) -> str:
    """Return which groups learn in which steps, with factors other than 1."""
    texts = []
    for stage in stages:
        groups = [name if factor == 1 else f"{name} x {factor:g}" for name, factor in stage.factors.items()]
        texts.append(f"{stage.steps} steps from {stage.first}: {', '.join(groups) or 'none'}")
    return "; ".join(texts)
