"""Shares and gradients of the loss terms: against autograd, and without a trace in the training."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from composer import Callback, DataSpec, Trainer
from composer.loggers import InMemoryLogger
from torch import Tensor

from recipe.callbacks.measures import LANGUAGE, LossGradients, LossShares, term_weights
from recipe.config import OptimizerConfig, RecipeConfig
from recipe.data.loader import get_num_samples_in_batch, get_num_tokens_in_batch
from recipe.joint import JointModel
from recipe.losses.counts import split_batch
from recipe.optim.groups import build_optimizer, group_parameters
from recipe.schema import Batch, Example
from tests.support.tiny_cases import make_batches, make_model, microbatches_of

RATES = OptimizerConfig(lr_vision=1e-3, lr_merger=1e-3, lr_llm=1e-3, lr_adapter=1e-3, lr_detection=1e-3)


def expected_gradients(model: JointModel, batch: Batch) -> dict[str, float]:
    """By `torch.autograd.grad` of every weighted term, from one forward pass over the whole batch."""
    parameters = [parameter for _, parameter in group_parameters(model)["merger"]]
    terms = model.loss(model(batch), batch)
    found: dict[str, float] = {}
    sums = {True: torch.zeros(()), False: torch.zeros(())}
    for term, weight in term_weights(model.loss_config).items():
        names = (f"loss_{term}{suffix}" for suffix in ("", "_aux", "_dn", "_proposals"))
        repeats = [terms[name] for name in names if name in terms]
        gradient = torch.autograd.grad(weight * torch.stack(repeats).sum(), parameters, retain_graph=True)
        flat = torch.cat([part.flatten() for part in gradient])
        found[f"loss_gradient/{term}"] = float(flat.norm())
        sums[term in LANGUAGE] = sums[term in LANGUAGE] + flat
    found["loss_gradient/cosine"] = float(torch.cosine_similarity(sums[True], sums[False], dim=0))
    return found


def fit(
    config: RecipeConfig,
    examples: Sequence[Example],
    callbacks: list[Callback],
    rates: OptimizerConfig,
    microbatch_size: int = 2,
) -> tuple[InMemoryLogger, dict[str, Tensor]]:
    """Two steps over the same examples; what was logged, and the weights."""
    model = make_model(config)
    memory = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(
            [microbatches_of(examples, "packed", microbatch_size) for _ in range(2)],
            split_batch=split_batch,
            get_num_samples_in_batch=get_num_samples_in_batch,
            get_num_tokens_in_batch=get_num_tokens_in_batch,
        ),
        optimizers=build_optimizer(model, rates),
        callbacks=callbacks,
        loggers=[memory],
        max_duration="2ba",
        device="cpu",
        device_train_microbatch_size=microbatch_size,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        seed=3,
    )
    trainer.fit()
    trainer.close()
    return memory, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.slow
def test_shares_and_gradients_leave_no_trace(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
) -> None:
    """Dropout, so that every random number drawn elsewhere would show in the weights."""
    config = tiny_config(detection_head={"dropout": 0.3}, caption_decoder={"dropout": 0.3})
    examples = [tiny_examples[name] for name in ("one", "text", "unannotated")]
    _, plain = fit(config, examples, [], RATES)
    memory, watched = fit(config, examples, [LossShares(), LossGradients("1ba")], RATES)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    shares = [[float(value) for _, value in rows] for name, rows in memory.data.items() if "loss/share" in name]
    assert len(shares) == 6
    assert [sum(step) for step in zip(*shares, strict=True)] == pytest.approx([1, 1], rel=1e-5)
    assert len(memory.data["loss_gradient/cosine"]) == 2


def test_gradients_are_those_of_autograd(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
) -> None:
    examples = [tiny_examples["one"]]
    memory, _ = fit(tiny_config(), examples, [LossGradients("1ba")], RATES)
    found = {name: float(rows[0][1]) for name, rows in memory.data.items() if name.startswith("loss_gradient")}
    (batch,) = make_batches(examples, "packed", 2)
    assert found == pytest.approx(expected_gradients(make_model(tiny_config()), batch), rel=1e-9)


def test_a_frozen_group_is_told_once(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], caplog: pytest.LogCaptureFixture
) -> None:
    rates = replace(RATES, lr_merger=0.0)
    memory, _ = fit(tiny_config(), [tiny_examples["text"]], [LossGradients("1ba")], rates)
    assert not any(name.startswith("loss_gradient") for name in memory.data)
    assert sum("merger is frozen" in record.message for record in caplog.records) == 1


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match=r"loss_gradients\.group is 'mergers': it must be one of vision, merger"):
        LossGradients("1ba", "mergers")
