"""What `train_loader.augment` refuses before a model is built."""

from dataclasses import replace
from typing import Any

import pytest

from recipe.checks import check_augmentation, check_cache
from recipe.config import (
    AugmentConfig,
    CacheFrozenConfig,
    ConfigError,
    CropConfig,
    LoaderConfig,
    OptimizerConfig,
    PromptConfig,
    RecipeConfig,
    TeacherConfig,
)
from recipe.configure import load_config
from recipe.rules import check_config

YAML = "yamls/quickstart.yaml"


def with_augment(**changes: Any) -> RecipeConfig:
    return RecipeConfig(train_loader=LoaderConfig(augment=AugmentConfig(**changes)))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("{horizontal_flip: 2}", r"train_loader\.augment\.horizontal_flip is 2.0: it must be between 0 and 1"),
        (
            "{scale_jitter: [1.5, 0.5]}",
            r"scale_jitter is \[1\.5, 0\.5\]: it must be two numbers from 0\.1 to 10, the low",
        ),
        ("{scale_jitter: [0.5]}", "it must be two numbers"),
        (
            "{crop: {scale: [0.5, 1.5]}}",
            r"augment\.crop\.scale is \[0\.5, 1\.5\]: it must be two numbers from 0\.01 to 1",
        ),
        ("{colour: {hue: 0.5}}", r"augment\.colour\.hue is 0\.5: it must be between 0 and 0\.1"),
        ("{flip: 0.5}", r"unknown key train_loader\.augment\.flip"),
    ],
)
def test_bounds(override: str, expected: str):
    with pytest.raises(ConfigError, match=expected):
        check_config(load_config(YAML, [f"train_loader.augment={override}"]))


def test_the_keys_are_read():
    text = (
        "{horizontal_flip: 0.5, crop: {}, scale_jitter: [0.5, 1.5], colour: {hue: 0.02}, languages: [en, no], "
        "words: {swapped: {port bow: starboard bow, a: on}, not_flipped: [tattoo, off]}}"
    )
    config = load_config(YAML, [f"train_loader.augment={text}"])
    check_config(config)
    augment = config.train_loader.augment
    assert augment is not None and augment.crop == CropConfig() and augment.languages == ["en", "no"]
    assert augment.words.swapped == {"port bow": "starboard bow", "a": "on"}
    assert augment.words.not_flipped == ["tattoo", "off"]
    with pytest.raises(ConfigError, match=r"languages holds 'no'"):
        check_augmentation(config)


def test_an_evaluation_is_never_augmented():
    with pytest.raises(ConfigError, match=r"eval_loader\.augment: an evaluation sees every image as it is"):
        check_config(load_config(YAML, ["eval_loader.augment={horizontal_flip: 0.5}"]))


def test_what_changes_nothing_is_refused():
    for changes in ({}, {"horizontal_flip": 0.0, "teachers": True}):
        with pytest.raises(
            ConfigError, match=r"augment changes nothing: set horizontal_flip, crop, scale_jitter, colour"
        ):
            check_augmentation(with_augment(**changes))
    with pytest.raises(ConfigError, match=r"crop\.ratio is \[1\.5, 2\.0\]: 1 must be between"):
        check_augmentation(with_augment(crop=CropConfig(ratio=[1.5, 2.0])))
    with pytest.raises(ConfigError, match=r"teachers is true, but teachers\.num_teachers is 0"):
        check_augmentation(with_augment(horizontal_flip=0.5, teachers=True))
    check_augmentation(replace(with_augment(horizontal_flip=0.5, teachers=True), teachers=TeacherConfig({}, 1)))


def test_a_prompt_that_a_flip_makes_untrue_is_refused():
    flipped = with_augment(horizontal_flip=0.5)
    check_augmentation(flipped)

    def check(**prompt: Any) -> None:
        check_augmentation(replace(flipped, prompt=PromptConfig(**prompt)))

    check(candidate_phrases=["left side panel", "right side panel", "wheel"])
    untrue: list[tuple[dict[str, Any], str]] = [
        ({"detect": "Find the dog on the left."}, "detect"),
        ({"system": "You read license plates."}, "system"),
        ({"candidate_phrases": ["wheel", "stop sign"]}, "candidate_phrases"),
        ({"candidate_phrases": ["left side panel", "wheel"]}, "candidate_phrases"),
    ]
    for prompt, key in untrue:
        with pytest.raises(ConfigError, match=rf"horizontal_flip would make prompt\.{key} untrue \('"):
            check(**prompt)
        check_augmentation(replace(with_augment(crop=CropConfig()), prompt=PromptConfig(**prompt)))


def test_a_cache_of_the_trunk_is_refused():
    frozen = OptimizerConfig(lr_vision=0, lr_merger=0, lr_llm=0)
    config = replace(with_augment(horizontal_flip=0.5), optimizer=frozen, cache_frozen=CacheFrozenConfig("x"))
    with pytest.raises(
        ConfigError, match=r"^cache_frozen with train_loader\.augment: .* set train_loader\.augment=null"
    ):
        check_cache(config)
