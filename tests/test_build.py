"""`recipe.build`: every switch of the yaml reaches the module that it is for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from recipe.build import build_model
from recipe.config import ConfigError, RecipeConfig
from recipe.load import load_processor
from recipe.models.network import JointNetwork
from recipe.schema import Example
from tests.support.tiny_cases import collator, make_model

Read = Callable[[JointNetwork], Any]


def dropout_of(module: nn.Module) -> set[float]:
    return {part.p for part in module.modules() if isinstance(part, nn.Dropout)}


@pytest.mark.parametrize(
    ("section", "switch", "value", "read"),
    [
        ("detection_head", "memory_positions", False, lambda net: net.memory.memory_positions),
        ("detection_head", "local_attention", False, lambda net: bool(net.detection_head.places.any())),
        ("detection_head", "refine_boxes", False, lambda net: net.detection_head.refine_boxes),
        ("detection_head", "aux_loss", False, lambda net: net.aux_loss),
        ("detection_head", "num_denoising_groups", 3, lambda net: net.num_denoising_groups),
        ("detection_head", "box_noise", 0.4, lambda net: net.box_noise),
        ("detection_head", "dropout", 0.3, lambda net: dropout_of(net.detection_head)),
        ("detection_head", "num_query_groups", 2, lambda net: net.detection_head.num_query_groups),
        ("detection_head", "select_queries", False, lambda net: net.detection_head.proposal_head is not None),
        ("detection_head", "multi_scale", True, lambda net: net.memory.pyramid is not None),
        ("caption_decoder", "dropout", 0.3, lambda net: dropout_of(net.caption_decoder)),
        ("loss", "focal_alpha", 0.6, lambda net: net.focal[0]),
        ("loss", "focal_gamma", 1.5, lambda net: net.focal[1]),
    ],
)
def test_every_switch_reaches_its_module(
    section: str, switch: str, value: Any, read: Read, tiny_config: Callable[..., RecipeConfig]
) -> None:
    config = tiny_config(**{section: {switch: value}})
    network = build_model(config, load_processor(config.model.pretrained_model_name_or_path)).model
    assert read(network) == ({value} if switch == "dropout" else value)


def test_the_matcher_is_given_the_focal_parameters(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(Exception):
        """What `match` was given, after layers and targets."""

    def told(layers: object, targets: object, *others: object) -> None:
        raise Told(others)

    monkeypatch.setattr("recipe.models.network.match", told)
    changes = {"matcher": {"cost_bbox": 1.0, "cost_giou": 2.0, "cost_objectness": 3.0}}
    model = make_model(tiny_config(loss={"focal_alpha": 0.6, "focal_gamma": 1.5}, **changes))
    with pytest.raises(Told) as raised:
        model(collator("standard")([tiny_examples["two"]]))
    assert raised.value.args[0] == (1.0, 2.0, 3.0, 0.6, 1.5)


@pytest.mark.parametrize(
    ("width", "num_heads", "named"),
    [(36, 4, "8, as the positions of boxes need"), (32, 6, "detection_head.num_heads 6")],
)
def test_a_width_that_does_not_fit_is_told(
    width: int, num_heads: int, named: str, tiny_config: Callable[..., RecipeConfig]
) -> None:
    with pytest.raises(ConfigError, match=f"detection_head.width {width} is not a multiple of {named}"):
        make_model(tiny_config(detection_head={"width": width, "num_heads": num_heads}))


def test_captions_begin_where_their_boxes_are(tiny_config: Callable[..., RecipeConfig]) -> None:
    config = tiny_config()
    for layer in build_model(
        config, load_processor(config.model.pretrained_model_name_or_path)
    ).model.caption_decoder.layers:
        attention = layer.cross_attention
        assert attention.query_position is not None and attention.key_position is not None
        assert torch.equal(attention.query_position.weight, attention.key_position.weight)
