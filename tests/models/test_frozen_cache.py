"""A trunk that never learns: its readings come back with the bits they had, and it does not run again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipe.callbacks.cache_frozen import parse_size, trunk_fingerprint
from recipe.callbacks.throughput import step_flops
from recipe.config import OptimizerConfig, RecipeConfig
from recipe.joint import JointModel
from recipe.models.frozen_cache import PART, SUFFIX, FrozenCache, TrunkReading, bytes_of
from recipe.optim.groups import build_optimizer
from recipe.schema import Example
from tests.support.tiny_cases import (
    ALL_SWITCHES,
    collator,
    gradient_error,
    loss_error,
    losses_and_gradients,
    make_batches,
    make_encoder,
    make_examples,
    make_model,
    make_samples,
)

ROOM = 10**9


def reading(seed: int, dtype: torch.dtype = torch.float32) -> TrunkReading:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, 8), (5, 8), (3, 4, 6))]
    return TrunkReading(draw[0], draw[1], draw[2] if seed % 2 else None)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/*{SUFFIX}"))


def equal(first: TrunkReading, second: TrunkReading) -> bool:
    one, other = first.tensors(), second.tensors()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_read_has_the_bits_that_were_written(tmp_path: Path, dtype: torch.dtype):
    cache, written = FrozenCache(tmp_path, "base", ROOM), [reading(0, dtype), reading(1, dtype)]
    assert cache.read(["a", "b"], torch.device("cpu")) is None
    cache.write(["a", "b"], written)
    again = FrozenCache(tmp_path, "base", ROOM)
    found = again.read(["b", "a"], torch.device("cpu"))
    assert found is not None and equal(found[0], written[1]) and equal(found[1], written[0])
    assert all(value.dtype == dtype for item in found for value in item.tensors().values())
    assert again.has(["a"]) and not again.has(["a", "c"]) and again.read(["a", "c"], torch.device("cpu")) is None
    assert FrozenCache(tmp_path, "other", ROOM).read(["a"], torch.device("cpu")) is None
    assert (again.num_read, again.num_computed) == (1, 1)


def test_what_a_killed_run_leaves_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = FrozenCache(tmp_path, "base", ROOM)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.write(["a"], [reading(0)])
    (part,) = tmp_path.glob(f"*/*{PART}")
    assert cache.read(["a"], torch.device("cpu")) is None
    assert bytes_of(tmp_path) == 0 and part.exists()  # it may be another rank's
    monkeypatch.setattr("recipe.models.frozen_cache.time.time", lambda: part.stat().st_mtime + 4000)
    bytes_of(tmp_path)
    assert not part.exists()


def test_a_damaged_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cache = FrozenCache(tmp_path, "base", ROOM)
    cache.write(["a"], [reading(0)])
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    assert cache.read(["a"], torch.device("cpu")) is None and "computing it again" in caplog.text
    cache.write(["a"], [reading(0)])
    assert cache.read(["a"], torch.device("cpu")) is not None


def test_a_full_cache_takes_no_more_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    size = sum(value.nbytes for value in reading(0).tensors().values())
    cache = FrozenCache(tmp_path, "base", 2 * size)
    for name in "abcd":
        cache.write([name], [reading(0)])
    assert len(files(tmp_path)) == 2 and caplog.text.count("raise cache_frozen.size_limit") == 1
    assert cache.read(["a"], torch.device("cpu")) is not None


def test_a_reading_that_is_not_finite_is_not_kept(tmp_path: Path):
    bad = reading(0)
    bad.prompt[1, 2] = torch.nan
    FrozenCache(tmp_path, "base", ROOM).write(["a"], [bad])
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("50gb", 50 * 10**9),
        ("1.5 TB", 15 * 10**11),
        ("200b", 200),
        ("0gb", 0),
        ("50", None),
        ("-1gb", None),
        ("", None),
    ],
)
def test_sizes(text: str, size: int | None):
    assert parse_size(text) == size


def frozen_model(config: RecipeConfig) -> JointModel:
    model = make_model(config)
    build_optimizer(model, OptimizerConfig(lr_vision=0, lr_merger=0, lr_llm=0))
    return model


@contextmanager
def counted_runs(model: JointModel) -> Iterator[list[str]]:
    """The names of the parts of the trunk that ran."""
    runs: list[str] = []
    parts = {"vision": model.model.vlm.hf_model.model.visual, "llm": model.model.vlm.hf_model.model.language_model}
    hooks = [part.register_forward_hook(lambda *_, name=name: runs.append(name)) for name, part in parts.items()]
    yield runs
    for hook in hooks:
        hook.remove()


def bare_examples(config: RecipeConfig) -> list[Example]:
    """Every kind of sample without answers; contents as the loader gives them."""
    examples = make_examples(config, with_answers=False)
    return [
        replace(example, contents=[f"{name} {image}" for image in example.student_images])
        for name, example in examples.items()
    ]


@pytest.mark.parametrize("layout", ["standard", "packed"])
@pytest.mark.parametrize("changes", [{}, ALL_SWITCHES, {"model": {"dtype": "bfloat16"}}])
def test_a_second_epoch_is_the_first_without_the_trunk(
    tiny_config: Callable[..., RecipeConfig], tmp_path: Path, changes: Any, layout: str
):
    config = tiny_config(**changes)
    model, batches = frozen_model(config), make_batches(bare_examples(config), layout, 3)
    expected = losses_and_gradients(model, batches)
    model.model.cache = FrozenCache(tmp_path, "base", ROOM)
    with counted_runs(model) as runs:
        first = losses_and_gradients(model, batches)
        assert sorted(set(runs)) == ["llm", "vision"]
        runs.clear()
        second = losses_and_gradients(model, batches)
        assert runs == []
    assert len(files(tmp_path)) == 9  # a text has no image
    for found in (first, second):  # to the bit
        assert loss_error(found[0], expected[0]) == 0 and gradient_error(found[1], expected[1]) == 0
    flops = [step_flops(model.model, batches, {"detection", "adapter"}).model]
    model.model.cache = None
    flops.append(step_flops(model.model, batches, {"detection", "adapter"}).model)
    assert flops[0]["detection"] == flops[1]["detection"] > 0
    assert flops[0]["llm"] == flops[0]["vision"] == 0 < flops[1]["llm"]


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0.02)])
def test_read_in_another_pack(tiny_config: Callable[..., RecipeConfig], tmp_path: Path, dtype: str, bound: float):
    """Beside computing afresh there, what was computed in another pack and layout differs by rounding."""
    config = tiny_config(model={"dtype": dtype}, **ALL_SWITCHES)
    model, examples = frozen_model(config), bare_examples(config)
    model.model.cache = FrozenCache(tmp_path, "base", ROOM)
    losses_and_gradients(model, make_batches(examples, "standard", 2))
    read = losses_and_gradients(model, make_batches(examples[::-1], "packed", 3))
    model.model.cache = None
    afresh = losses_and_gradients(model, make_batches(examples[::-1], "packed", 3))
    errors = loss_error(read[0], afresh[0]), gradient_error(read[1], afresh[1])
    # measured: 3.6e-16 in float64, 6.2e-7 in float32, 0 in bfloat16, whose rounding swallows the differences here
    assert max(errors) <= bound


def test_a_microbatch_with_one_new_image_is_computed_whole(tiny_config: Callable[..., RecipeConfig], tmp_path: Path):
    config = tiny_config()
    model, examples = frozen_model(config), bare_examples(config)
    model.model.cache = FrozenCache(tmp_path, "base", ROOM)
    pictures = [example for example in examples if example.student_images]
    losses_and_gradients(model, make_batches(pictures[:2], "packed", 2))
    with counted_runs(model) as runs:
        losses_and_gradients(model, make_batches(pictures[:3], "packed", 3))
        assert sorted(set(runs)) == ["llm", "vision"]
    assert len(files(tmp_path)) == 3
    text = [example for example in examples if not example.student_images]
    with counted_runs(model) as runs:
        losses_and_gradients(model, make_batches(text, "packed", 1))
        assert runs == []


def test_evaluation_does_not_read_it(tiny_config: Callable[..., RecipeConfig], tmp_path: Path):
    config = tiny_config()
    model, examples = frozen_model(config), list(make_examples(config).values())
    model.model.cache = FrozenCache(tmp_path, "base", ROOM)
    with counted_runs(model) as runs, torch.no_grad():
        model.eval()(collator("packed")(examples))
        assert runs == ["vision", "llm"] and not files(tmp_path)


def test_the_content_is_of_pixels_prompt_and_budget_alone(tiny_config: Callable[..., RecipeConfig]):
    samples, config = make_samples(), tiny_config()
    encoder = replace(make_encoder(config), with_content=True)
    sample, teacher = samples["two"], samples["teacher"]
    content = encoder(sample).contents[0]
    assert len(content) == 40 and make_encoder(config)(sample).contents == [""]
    assert encoder(sample, with_answers=False).contents == [content]
    assert encoder(replace(sample, id="other", objects=())).contents == [content]
    others = [
        encoder(sample, [teacher]).contents[0],
        encoder(samples["one"]).contents[0],
        replace(encoder, prompt=replace(config.prompt, detect="Find."))(sample).contents[0],
        replace(encoder, image_spec=replace(encoder.image_spec, max_pixels=9000))(sample).contents[0],
        replace(encoder, image_spec=replace(encoder.image_spec, image_mean=(0.1, 0.2, 0.3)))(sample).contents[0],
    ]
    assert len({content, *others}) == 6
    assert len(set(encoder(samples["in_turns"]).contents)) == 3


def test_the_fingerprint_is_of_the_trunk_alone(tiny_config: Callable[..., RecipeConfig]):
    network = make_model(tiny_config()).model
    first = trunk_fingerprint(network)
    with torch.no_grad():
        next(network.memory.parameters()).add_(1)
        assert trunk_fingerprint(network) == first
        weight = network.vlm.hf_model.model.visual.blocks[0].attn.qkv.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], weight[0, 0] + 1)
    assert trunk_fingerprint(network) != first
