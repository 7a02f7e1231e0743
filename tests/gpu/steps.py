"""Measure optimizer steps of the published size: time, model FLOPs utilisation, memory, host waits; and answering."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import Precision, get_precision_context
from torch.optim import Optimizer

import answering as answers
from recipe.algorithms.snapshot import Snapshot
from recipe.callbacks.throughput import step_flops
from recipe.config import RecipeConfig
from recipe.data.collate import collate_packed, collate_standard, one_each
from recipe.estimate import GIB, estimate
from recipe.joint import JointModel
from recipe.optim.groups import build_optimizer, named_groups
from recipe.schema import Batch
from step_speed import make_examples, padding_waste
from tests.gpu.models import (
    build_random,
    encoder_of,
    leg_config,
    on_device,
    out_of_memory_is_reported,
    packed_batch,
    read_images,
)
from tests.gpu.session import Session, rounded

TOKENS = {"3b": (4096, 8192), "7b": (4096, 8192), "tiny": (256, 512)}
ANSWERED = {"3b": 8, "7b": 8, "tiny": 2}
SYNC = "called a synchronizing CUDA operation"


def head(session: Session) -> None:
    """Time yamls/head.yaml."""
    _leg(session, "head")


def lora(session: Session) -> None:
    """Time yamls/lora.yaml, its adapters trained, and the snapshot of what it trains."""
    if find_spec("peft") is None:
        session.not_run("step lora", "peft is absent")
        return
    model, optimizer = _leg(session, "lora")
    _snapshot(session, model, optimizer)


def full(session: Session) -> None:
    """Time yamls/joint.yaml, everything trained."""
    _leg(session, "full")


# --- quantised weights and moments -----------------------------------------------------------------------------------
# {name: overrides of yamls/lora.yaml}; a name is measured like the legs above, if bitsandbytes is installed.
QUANTISED: dict[str, tuple[str, ...]] = {
    "nf4": ("model.frozen_dtype=nf4",),
    "8bit": ("optimizer.moments=8bit",),
}


def quantised(session: Session) -> None:
    """Time what needs bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        session.not_run("quantised", "bitsandbytes is absent")
        return
    for name, overrides in QUANTISED.items():
        _leg(session, "lora", name, *overrides)


# ---------------------------------------------------------------------------------------------------------------------


def make_step(
    session: Session, model: JointModel, optimizer: Optimizer, batch: Batch, precision: str
) -> Callable[[], None]:
    """Return a function that trains one step, without Composer's Trainer."""

    def step() -> None:
        optimizer.zero_grad()
        with get_precision_context(precision):
            loss = model.loss(model(batch), batch)["total"]
        loss.backward()
        optimizer.step()

    return step


def _leg(session: Session, leg: str, name: str = "", *overrides: str) -> tuple[JointModel, Optimizer]:
    """Time the steps of a leg at each number of tokens; return its model and optimizer."""
    first, *_ = TOKENS[session.size]
    config = leg_config(session, leg, first, *overrides)
    start = session.now()
    model, processor = build_random(session, config)
    optimizer = build_optimizer(model.train(), config.optimizer)
    session.report(f"built {name or leg}", seconds=rounded(session.now() - start))
    for tokens in TOKENS[session.size]:
        config = leg_config(session, leg, tokens, *overrides)
        title = f"step {name or leg} {tokens}"
        with out_of_memory_is_reported(session, title):
            batch = packed_batch(session, config, encoder_of(config, model, processor), tokens)
            session.report(title, **step_figures(session, config, model, optimizer, batch))
        optimizer.zero_grad()
    return model, optimizer


def step_figures(
    session: Session, config: RecipeConfig, model: JointModel, optimizer: Optimizer, batch: Batch
) -> dict[str, Any]:
    """Return time, rates, utilisation and memory of a step, next to the estimate."""
    step = make_step(session, model, optimizer, batch, session.precision)
    if session.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = session.seconds(step)
    peak = torch.cuda.max_memory_allocated() / GIB if session.is_cuda else None
    network = model.model
    flops = step_flops(network, [batch], set(named_groups(optimizer))).model
    peak_flops = get_gpu_flops_available(SimpleNamespace(precision=Precision(session.precision)))  # pyright: ignore[reportArgumentType]
    parts = {"vision": flops["vision"] + flops["merger"], "llm": flops["llm"], "head": flops["detection"]}
    rates = {"": flops.total(), **{f"_{part}": count for part, count in parts.items()}}
    return {
        "ms": rounded(1e3 * seconds, 4),
        "tokens": batch["num_tokens"],
        "images": len(batch["image_grid_thw"]),
        "tokens_per_s": rounded(batch["num_tokens"] / seconds, 4),
        "images_per_s": rounded(len(batch["image_grid_thw"]) / seconds, 4),
        "tflops": rounded(flops.total() / 1e12, 4),
        **{f"mfu{part}": rounded(count / seconds / peak_flops) for part, count in rates.items() if peak_flops},
        **forward_ms(session, model, step),
        "peak_gib": rounded(peak, 4),
        "estimate_gib": rounded(estimate(config, network, 1).device_total / GIB, 4),
        **waits(session, step),
    }


def forward_ms(session: Session, model: JointModel, step: Callable[[], None]) -> dict[str, float | None]:
    """Return milliseconds of the forward pass: vision tower with merger, language model, and all the rest."""
    hf_model: Any = model.model.vlm.hf_model.model
    watches = [answers.Stopwatch(part) for part in (hf_model.visual, hf_model.language_model, model)]
    with watches[0].running(), watches[1].running(), watches[2].running():
        step()
    vision, llm, whole = (1e3 * watch.seconds for watch in watches)
    return {
        "forward_vision_ms": rounded(vision),
        "forward_llm_ms": rounded(llm),
        "forward_rest_ms": rounded(whole - vision - llm),
    }


@contextmanager
def counting_waits(found: "Counter[str]") -> Iterator[None]:
    """Count within it how often the host waits for the GPU, by file and line; torch does not see all of them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found.update(f"{Path(entry.filename).name}:{entry.lineno}" for entry in caught if SYNC in str(entry.message))


def waits(session: Session, step: Callable[[], None]) -> dict[str, Any]:
    """Return how often the host waits for the GPU in a step, and where most."""
    if not session.is_cuda:
        return {"waits": None}
    found: Counter[str] = Counter()
    with counting_waits(found):
        step()
    return {"waits": found.total(), "waits_where": dict(found.most_common(5))}


def _snapshot(session: Session, model: JointModel, optimizer: Optimizer) -> None:
    """Time the copy of what is trained into pinned host memory: the first time, which allocates it, and later."""
    state: Any = SimpleNamespace(model=model, optimizers=[optimizer], timestamp=SimpleNamespace(batch=0))
    snapshot = Snapshot()
    start = session.now()
    snapshot.take(state)
    first = session.now() - start
    seconds = session.seconds(lambda: snapshot.take(state), warm_up=0)
    copied = sum(tensor.nbytes for tensor in snapshot._copies.values())
    back = session.seconds(lambda: snapshot.restore(state), warm_up=0)
    session.report(
        "snapshot",
        gb=rounded(copied / 1e9),
        first_ms=rounded(1e3 * first),
        ms=rounded(1e3 * seconds),
        gb_per_s=rounded(copied / 1e9 / seconds),
        restore_ms=rounded(1e3 * back),
        pinned=all(tensor.is_pinned() for tensor in snapshot._copies.values()) if session.is_cuda else None,
    )


def layouts(session: Session) -> None:
    """Time the same samples packed and padded, by yamls/lora.yaml; without peft by yamls/head.yaml, answers kept."""
    leg = "lora" if find_spec("peft") else "head"
    config = leg_config(session, leg, 4096)
    model, processor = build_random(session, config)
    optimizer = build_optimizer(model.train(), config.optimizer)
    examples = make_examples(config)
    batches = {
        "packed": collate_packed(one_each(examples)),
        "padded": collate_standard(one_each(examples), processor.tokenizer.pad_token_id),
    }
    seconds: dict[str, float] = {}
    for name, batch in batches.items():
        with out_of_memory_is_reported(session, f"layout {name}"):
            batch = on_device(session, batch)
            step = make_step(session, model, optimizer, batch, session.precision)
            work = session.seconds(step)
            seconds[name] = work
            peak = session.peak_bytes(step) if session.is_cuda else None
            session.report(
                f"layout {name}",
                ms=rounded(1e3 * work, 4),
                tokens_per_s=rounded(batch["num_tokens"] / work, 4),
                extra_gib=None if peak is None else rounded(peak / GIB),
            )
    if len(seconds) == 2:
        session.report(
            "packed_over_padded",
            leg=leg,
            speed=rounded(seconds["padded"] / seconds["packed"]),
            padding=rounded(padding_waste(examples)),
        )


def answering(session: Session) -> None:
    """Report the rate of boxes of the head, and of the language model if it wrote the true answers.

    With random weights no answer holds boxes, so as many tokens are generated as the batch's longest true answer has,
    and as many of the head's boxes count, with captions, as there are true objects.
    """
    config = leg_config(session, "head", TOKENS[session.size][0])
    model, processor = build_random(session, config)
    model.eval()
    encoder = encoder_of(config, model, processor)
    samples = read_images(session, ANSWERED[session.size])
    for batch_size in (1, len(samples)):
        part = samples[:1] if batch_size == 1 else samples
        boxes = sum(not item.iscrowd for sample in part for item in sample.objects or ())
        longest = max(len(encoder(sample).input_ids) - encoder(sample).prompt_length for sample in part)
        evaluation = replace(config.evaluation, score_threshold=0.0, max_new_tokens=longest)
        asked = replace(config, evaluation=evaluation)
        (batch,) = answers.make_batches(part, batch_size, encoder, session.composer_device())
        asked = replace(asked, evaluation=replace(evaluation, score_threshold=_threshold(model, batch, asked, boxes)))
        hf_model: Any = model.model.vlm.hf_model
        ways = {"head": (answers.by_head, model.model.vlm), "text": (answers.by_text, hf_model.model)}
        seconds: dict[str, float] = {}
        for name, (way, shared) in ways.items():
            timings = [answers.Timing() for _ in range(3 if session.is_cuda else 2)]
            for timing in timings:
                answers.answer(timing, way, shared, model, batch, asked)
            seconds[name] = min(timing.seconds for timing in timings[1:])
        session.report(
            f"answering {batch_size}",
            boxes=boxes,
            answer_tokens=longest,
            boxes_per_s_head=rounded(boxes / seconds["head"], 4),
            boxes_per_s_text=rounded(boxes / seconds["text"], 4),
            ratio=rounded(seconds["text"] / seconds["head"]),
        )


def _threshold(model: JointModel, batch: Batch, config: RecipeConfig, boxes: int) -> float:
    """Return the score that `boxes` of the head's objects reach."""
    with torch.inference_mode(), get_precision_context(config.trainer["precision"]):
        scores: Sequence[float] = sorted(
            (item.score for found in answers.by_head(model, batch, config) for item in found.answer_objects or ()),
            reverse=True,
        )
    return scores[min(boxes, len(scores)) - 1] if scores and boxes else 1.0
