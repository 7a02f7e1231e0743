"""The whole model is exact: no leak of the answer, no leak between samples, no trace of how a batch was cut.

Worst cases measured in float64 stand beside the tolerances.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from recipe.config import AugmentConfig, ColourConfig, CropConfig, OptimizerConfig, RecipeConfig
from recipe.joint import JointModel
from recipe.optim.groups import build_optimizer
from recipe.schema import DetectionOutputs, Example, JointOutputs, Role
from tests.support.tiny_cases import (
    ADAPTED,
    ALL_SWITCHES,
    IN_NF4,
    OTHER_FAMILIES,
    collator,
    gradient_error,
    loss_error,
    losses_and_gradients,
    make_batches,
    make_examples,
    make_model,
)

FIRST_SPECIAL_TOKEN = 320
LAYOUTS = pytest.mark.parametrize("layout", ["standard", "packed"])


def detection_tensors(outputs: DetectionOutputs) -> dict[str, Tensor]:
    tensors = {}
    for layer, (_, item) in enumerate(outputs.layers()):
        for name in ("pred_boxes", "pred_objectness", "query_features"):
            tensors[f"{name} {layer}"] = getattr(item, name)
    return tensors


def everything_but_answers(outputs: JointOutputs) -> dict[str, Tensor]:
    tensors = {"memory": outputs.memory.tokens, "captions": outputs.caption_losses}
    tensors |= detection_tensors(outputs.detection)
    if outputs.denoising is not None:
        tensors |= {f"denoising {name}": value for name, value in detection_tensors(outputs.denoising[1]).items()}
    return tensors


def largest_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    assert before.keys() == after.keys()
    return max(float((before[name] - after[name]).abs().max()) for name in before)


def with_other_answer(example: Example) -> Example:
    """Every token of the student's answer replaced."""
    answer = example.roles == Role.STUDENT
    ids = torch.where(answer, (example.input_ids + 11) % 200 + 20, example.input_ids)
    assert bool((ids != example.input_ids)[answer].all())
    return replace(example, input_ids=ids)


def with_shorter_answer(example: Example, dropped: int) -> Example:
    """The conversation without the last tokens of the student's last answer, or without all of it."""
    asked = (example.roles == Role.NONE) & (example.input_ids >= FIRST_SPECIAL_TOKEN)  # the last is of the last turn
    kept = max(example.prompt_length, int(asked.nonzero().max()) + 1, len(example.input_ids) - dropped)
    return replace(
        example,
        input_ids=example.input_ids[:kept],
        roles=example.roles[:kept],
        position_ids=example.position_ids[:, :kept],
    )


def with_other_content(example: Example) -> Example:
    """Other pixels, words, boxes, captions and noise, all of the same shapes."""
    generator = torch.Generator().manual_seed(1)
    special = example.input_ids >= FIRST_SPECIAL_TOKEN
    words = torch.where(special, example.input_ids, (example.input_ids + 31) % 200 + 20)
    targets = list(example.targets)
    for number, target in enumerate(targets):
        if target is not None:
            boxes = torch.rand(target["boxes"].shape, generator=generator) * 0.4 + 0.2
            captions = target["caption_ids"].where(target["caption_ids"] < 0, 33)
            targets[number] = {"boxes": boxes, "caption_ids": captions}
    pixels = torch.randint(0, 256, example.pixel_patches.shape, generator=generator, dtype=torch.uint8)
    seeds = [seed + 7 for seed in example.noise_seeds]
    return replace(example, input_ids=words, pixel_patches=pixels, targets=targets, noise_seeds=seeds)


@pytest.fixture
def mixed(tiny_examples: dict[str, Example]) -> list[Example]:
    return list(tiny_examples.values())


@pytest.fixture(scope="module")
def all_switches(tiny_config: Callable[..., RecipeConfig]) -> JointModel:
    return make_model(tiny_config(**ALL_SWITCHES))


@pytest.fixture(scope="module")
def adapted(tiny_config: Callable[..., RecipeConfig]) -> JointModel:
    return make_model(tiny_config(**ADAPTED))


@pytest.fixture(scope="module")
def in_nf4(tiny_config: Callable[..., RecipeConfig]) -> JointModel:
    return make_model(tiny_config(**IN_NF4))


@pytest.fixture(params=["plain", "all_switches", "adapted", "in_nf4"])
def either(request: pytest.FixtureRequest) -> JointModel:
    """The model as it is by default, with every ingredient of the head, and with adapters on a frozen trunk or nf4."""
    return request.getfixturevalue("tiny_model" if request.param == "plain" else request.param).train()


@LAYOUTS
@pytest.mark.parametrize("train", [True, False])
def test_the_answer_tokens_change_no_detection_output(
    either: JointModel, mixed: list[Example], layout: str, train: bool
):
    either.train(train)
    with torch.no_grad():
        before = either(collator(layout)(mixed))
        after = either(collator(layout)([with_other_answer(example) for example in mixed]))
    assert largest_change(everything_but_answers(before), everything_but_answers(after)) == 0.0
    assert float((before.label_losses - after.label_losses).abs().max()) > 0.1


@LAYOUTS
def test_the_length_of_the_answer_changes_no_detection_output(
    tiny_model: JointModel, mixed: list[Example], layout: str
):
    with torch.no_grad():
        before = tiny_model(collator(layout)(mixed))
        for dropped in (1, 5, 1000):
            cut = [with_shorter_answer(example, dropped) for example in mixed]
            after = tiny_model(collator(layout)(cut))
            # measured: 0.0
            assert largest_change(everything_but_answers(before), everything_but_answers(after)) <= 1e-12


@LAYOUTS
def test_one_sample_never_changes_another(either: JointModel, tiny_examples: dict[str, Example], layout: str):
    # Which of its too many objects are captioned depends on the content, and with it the shapes of all captions.
    examples = {name: example for name, example in tiny_examples.items() if name != "crowded"}
    with torch.no_grad():
        before = by_sample(either, examples, layout)
        for changed in examples:
            after = by_sample(either, {**examples, changed: with_other_content(examples[changed])}, layout)
            for name in examples:
                if name != changed:
                    assert largest_change(before[name], after[name]) == 0.0, f"{changed} leaks into {name}"
            assert largest_change(before[changed], after[changed]) > 0.1


def by_sample(model: JointModel, examples: dict[str, Example], layout: str) -> dict[str, dict[str, Tensor]]:
    """What a batch's outputs say of each sample."""
    batch = collator(layout)(list(examples.values()))
    outputs = model(batch)
    supervised = [int((example.roles != Role.NONE).sum()) for example in examples.values()]
    found = {
        name: {"answer": logits} for name, logits in zip(examples, outputs.label_losses.split(supervised), strict=True)
    }
    names = list(examples)
    shared = {key: value for key, value in everything_but_answers(outputs).items() if key != "captions"}
    for row, sample in enumerate(batch["student_samples"]):
        parts = {f"{key} of image {row}": value[row] for key, value in shared.items()}
        captions = outputs.caption_losses[outputs.caption_images == row]
        if len(captions):
            parts[f"captions of image {row}"] = captions
        found[names[sample]] |= parts
    return found


def test_padded_packed_and_microbatched_are_each_sample_alone(either: JointModel, mixed: list[Example]):
    """Every loss term and every gradient, denoising queries active."""
    losses, gradients = losses_and_gradients(either, make_batches(mixed, "standard", 1))
    assert all(float(value) > 0.1 for value in losses.values())
    assert {"loss_bbox_dn", "loss_bbox_aux", "loss_caption", "loss_lm_teacher"} < losses.keys()
    for layout in ("standard", "packed"):
        for microbatch_size in (8, 3, 2, 1):
            found, found_gradients = losses_and_gradients(either, make_batches(mixed, layout, microbatch_size))
            case = f"{layout}, microbatches of {microbatch_size}"
            # measured: 7.5e-16 and 7.6e-16
            assert loss_error(found, losses) <= 1e-9, case
            assert gradient_error(found_gradients, gradients) <= 1e-9, case


@OTHER_FAMILIES
@LAYOUTS
def test_other_families_are_as_exact(tiny_model: JointModel, tiny_examples: dict[str, Example], layout: str):
    """Between samples and from answers nothing flows; alone, padded, packed and split samples teach the same."""
    mixed = list(tiny_examples.values())
    test_the_answer_tokens_change_no_detection_output(tiny_model, mixed, layout, train=True)
    test_one_sample_never_changes_another(tiny_model, tiny_examples, layout)
    losses, gradients = losses_and_gradients(tiny_model, make_batches(mixed, "standard", 1))
    for microbatch_size in (8, 3):
        found, found_gradients = losses_and_gradients(tiny_model, make_batches(mixed, layout, microbatch_size))
        # measured: 5.9e-16 and 1.1e-15
        assert loss_error(found, losses) <= 1e-9
        assert gradient_error(found_gradients, gradients) <= 1e-9
    test_a_batch_without_objects_trains(tiny_model, tiny_examples, layout, "text")


@OTHER_FAMILIES
def test_both_losses_reach_the_tower(tiny_model: JointModel, tiny_examples: dict[str, Example]):
    """And all that turns its features into those of tokens."""
    (batch,) = make_batches([tiny_examples["one"]], "packed", 1)
    for name in ("loss_lm_student", "loss_bbox"):
        tiny_model.zero_grad(set_to_none=True)
        tiny_model.loss(tiny_model(batch), batch)[name].backward()
        visual = tiny_model.model.vlm.hf_model.model.visual
        assert all(float(p.grad.norm()) > 0 for _, p in visual.named_parameters() if p.grad is not None)
        unreached = [key for key, parameter in visual.named_parameters() if parameter.grad is None]
        assert not unreached, (name, unreached)


def test_augmented_samples_packed_are_each_alone(tiny_config: Callable[..., RecipeConfig], mixed: list[Example]):
    augment = AugmentConfig(0.5, CropConfig(1.0, [0.3, 0.7]), [0.5, 1.5], ColourConfig(), teachers=True)
    config = tiny_config()
    drawn = list(make_examples(config, augment=augment).values())
    patches = [example.pixel_patches for example in drawn]
    assert sum(not torch.equal(new, old.pixel_patches) for new, old in zip(patches, mixed, strict=True)) == 5
    model = make_model(config)
    losses, gradients = losses_and_gradients(model, make_batches(drawn, "standard", 1))
    for layout in ("standard", "packed"):
        found, found_gradients = losses_and_gradients(model, make_batches(drawn, layout, 3))
        # measured: 1.8e-16 and 5.2e-16
        assert loss_error(found, losses) <= 1e-9
        assert gradient_error(found_gradients, gradients) <= 1e-9


def test_order_of_samples_is_no_matter(tiny_model: JointModel, mixed: list[Example]):
    losses, gradients = losses_and_gradients(tiny_model, make_batches(mixed, "standard", 8))
    found, found_gradients = losses_and_gradients(tiny_model, make_batches(mixed[::-1], "packed", 4))
    # measured: 6.0e-16 and 8.1e-16
    assert loss_error(found, losses) <= 1e-9
    assert gradient_error(found_gradients, gradients) <= 1e-9


@LAYOUTS
def test_a_frozen_trunk_misses_no_answer(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], layout: str
):
    """The head's losses and gradients are those with answers; the language model's terms are gone, not 0."""
    config = tiny_config(**ALL_SWITCHES)
    model = make_model(config)
    build_optimizer(model, OptimizerConfig(lr_vision=0, lr_merger=0, lr_llm=0))
    bare = list(make_examples(config, with_answers=False).values())
    assert sum(len(item.input_ids) for item in bare) < sum(len(item.input_ids) for item in tiny_examples.values())
    losses, gradients = losses_and_gradients(model, make_batches(list(tiny_examples.values()), layout, 3))
    found, found_gradients = losses_and_gradients(model, make_batches(bare, layout, 3))
    assert {name for name in losses if name not in found} == {"loss_lm_teacher", "loss_lm_student"}
    expected = {name: losses[name] for name in found if name != "total"}
    # measured: 2.4e-16 and 3.6e-16
    assert loss_error({name: found[name] for name in expected}, expected) <= 1e-9
    assert gradient_error(found_gradients, gradients) <= 1e-9


@LAYOUTS
@pytest.mark.parametrize("name", ["text", "unannotated", "empty"])
def test_a_batch_without_objects_trains(
    tiny_model: JointModel, tiny_examples: dict[str, Example], layout: str, name: str
):
    """`losses_and_gradients` fails where a parameter gets no gradient: under DDP such a rank would hang the others."""
    losses, gradients = losses_and_gradients(tiny_model, make_batches([tiny_examples[name]], layout, 1))
    assert all(bool(value.isfinite()) for value in [*losses.values(), *(g.sum() for g in gradients.values())])
    for term in ("loss_bbox", "loss_giou", "loss_caption", "loss_bbox_dn", "loss_objectness_dn"):
        assert losses[term] == 0
    assert (losses["loss_objectness"] > 0) == (name == "empty")
    head = [float(value.norm()) for key, value in gradients.items() if ".detection_head." in key]
    assert (max(head) > 0) == (name == "empty")


@pytest.mark.parametrize(
    "head",
    [
        {"memory_positions": False},
        {"refine_boxes": False},
        {"aux_loss": False},
        {"num_denoising_groups": 0},
        {"width": None},
        {"multi_scale": False, "select_queries": False},
        {"select_queries": False},
        {"num_query_groups": 3},
        {"num_query_groups": 2, "select_queries": False, "num_denoising_groups": 0, "aux_loss": False},
    ],
    ids="-".join,
)
def test_every_switch_stays_exact(
    tiny_config: Callable[..., RecipeConfig], mixed: list[Example], head: dict[str, object]
):
    model = make_model(tiny_config(detection_head=head))
    losses, gradients = losses_and_gradients(model, make_batches(mixed, "standard", 6))
    found, found_gradients = losses_and_gradients(model, make_batches(mixed, "packed", 2))
    # measured: 4.5e-16 and 7.2e-16
    assert loss_error(found, losses) <= 1e-9
    assert gradient_error(found_gradients, gradients) <= 1e-9


def test_float32_is_as_exact_as_float32_can_be(tiny_config: Callable[..., RecipeConfig], mixed: list[Example]):
    model = make_model(tiny_config(model={"dtype": "float32"}))
    losses, gradients = losses_and_gradients(model, make_batches(mixed, "standard", 1))
    for layout in ("standard", "packed"):
        found, found_gradients = losses_and_gradients(model, make_batches(mixed, layout, 6))
        # measured: 3.2e-7 and 1.8e-7
        assert loss_error(found, losses) <= 1e-4
        assert gradient_error(found_gradients, gradients) <= 1e-4


def test_denoising_queries_leave_the_object_queries_alone(tiny_model: JointModel, mixed: list[Example]):
    batch = collator("standard")(mixed)
    with torch.no_grad():
        trained = tiny_model.train()(batch)
        evaluated = tiny_model.eval()(batch)
    assert trained.denoising is not None and evaluated.denoising is None
    # measured: 1.2e-15
    assert largest_change(detection_tensors(trained.detection), detection_tensors(evaluated.detection)) <= 1e-12
