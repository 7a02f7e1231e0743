"""`evaluation.classes: data`: the classes of the training set."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipe.build import class_names
from recipe.config import ConfigError, EvaluationConfig, LoaderConfig, RecipeConfig
from recipe.data import class_list
from recipe.data.class_list import read_classes
from recipe.records import CLASSES_FILE, RECORDS_FILE
from recipe.schema import FurtherImage, Object, Sample
from recipe.upstream.storage import open_streams

BOX = (0.0, 0.0, 10.0, 10.0)


@pytest.fixture
def streams(tmp_path: Path, make_sample, write_shards) -> dict[str, Any]:
    """Two streams, of which the first shares a caption with the second and has a crowd and an image without objects."""

    def sample(number: int, *captions: str) -> Sample:
        return replace(make_sample(number, 0, 40, 40), objects=tuple(Object(BOX, text) for text in captions))

    crowd = replace(sample(2), objects=(Object(BOX, "people", iscrowd=True),))
    first = write_shards(tmp_path / "first", [sample(0, "a dog", "cat"), sample(1, "cat"), crowd])
    return {"first": first, "second": write_shards(tmp_path / "second", [sample(3, "Cat ", "émeu")])}


def config_of(streams: dict[str, Any], *classes: str) -> RecipeConfig:
    loader = LoaderConfig(streams=streams, global_batch_size=1)
    return RecipeConfig(train_loader=loader, evaluation=EvaluationConfig(classes=list(classes)))


def test_the_different_captions_of_all_streams(streams: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert read_classes(open_streams(streams)) == ["a dog", "cat", "Cat ", "émeu"]
    assert class_names(config_of(streams, "data")) == ["a dog", "cat", "émeu"], "one class has one form"
    assert "evaluation.classes: the 3 of the training set, such as a dog, cat, émeu" in caplog.text
    assert class_names(config_of(streams, "a", "data")) == ["a", "data"], "a list of names is taken as it is"


def test_the_captions_of_all_images_of_a_chat(tmp_path: Path, make_sample, write_shards) -> None:
    chat = ({"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Both."})
    further = FurtherImage(make_sample(1, 0, 40, 40).image, 40, 40, (Object(BOX, "owl"),))
    several = replace(make_sample(0, 0, 40, 40), objects=(Object(BOX, "bat"),), messages=chat, further=(further,))
    streams = {"chats": write_shards(tmp_path / "chats", [several])}
    assert read_classes(open_streams(streams)) == ["bat", "owl"]


def test_the_list_of_the_source_comes_first(streams: dict[str, Any]) -> None:
    """Also with what no image holds; a stream without a list gives its captions."""
    Path(streams["first"]["local"], CLASSES_FILE).write_text("cat\na unicorn\n\na dog\n")
    assert class_names(config_of(streams, "data")) == ["cat", "a unicorn", "a dog", "émeu"]


def test_records_are_read_once(streams: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read_classes(open_streams(streams))
    for keywords in streams.values():
        Path(keywords["local"], RECORDS_FILE).write_bytes(b"damaged")
    assert len(read_classes(open_streams(streams))) == 4
    monkeypatch.setattr(class_list, "MOST_CLASSES", 1999)
    Path(streams["first"]["local"], RECORDS_FILE).unlink()
    for kept in Path(streams["first"]["local"]).glob("captions-*"):
        kept.unlink()
    with pytest.raises(ConfigError, match=r"has no records.*give evaluation.classes a list of names"):
        read_classes(open_streams(streams))


def test_open_captions_are_no_classes(streams: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_list, "MOST_CLASSES", 3)
    expected = "the training set has more than 3 different captions, so these are open captions"
    with pytest.raises(ConfigError, match=expected):
        class_names(config_of(streams, "data"))
