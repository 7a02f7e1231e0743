"""Files of strangers that try to run something: a folder of weights and a yaml. None of it runs; what is odd is named.

Others are tested with what reads them: pickled checkpoints in `checkpoints/test_checkpoint.py` and `test_loading.py`,
manifests in `checkpoints/test_find.py`, shards and indexes in `convert/test_verify.py` and `data/test_storage.py`,
RefCOCO's pickles in `convert/test_refcoco.py`, paths of images in `convert/test_image_files.py`, HTTP in `serve/`,
variables in a yaml in `tests/config`.
"""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import SecurityError

from recipe.config import ConfigError
from recipe.configure import load_config
from recipe.load import load_processor
from recipe.models.vlm import load_vlm


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A folder that whatever runs would make."""
    return tmp_path / "ran"


@pytest.fixture
def folder(tiny_checkpoint: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_folder_is_not_run(folder: Path, marker: Path) -> None:
    """Classes of the folder's own, for model, tokenizer and image processor: transformers' are used instead."""
    names = "Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast, Qwen2VLImageProcessorFast"
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nfrom transformers import {names}\n")
    for file, classes in (
        ("config.json", {"AutoConfig": "Qwen2_5_VLConfig", "AutoModelForImageTextToText": names.split(", ")[1]}),
        ("preprocessor_config.json", {"AutoImageProcessor": "Qwen2VLImageProcessorFast"}),
        ("tokenizer_config.json", {"AutoTokenizer": "Qwen2TokenizerFast"}),
    ):
        values = json.loads((folder / file).read_text())
        values["auto_map"] = {auto: f"own.{name}" for auto, name in classes.items()}
        (folder / file).write_text(json.dumps(values))
    processor = load_processor(str(folder))
    model = load_vlm(str(folder), "sdpa", "float32")
    found = [processor.tokenizer, processor.image_processor, model, model.config]
    assert all(type(item).__module__.startswith("transformers.") for item in found)
    assert not marker.exists()


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickled_weights_are_not_run(how: str, folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Harmful(marker)))
    else:
        torch.save({"weight": Harmful(marker)}, path)
    with pytest.raises(ConfigError, match=r"model\.pretrained_model_name_or_path"):
        load_vlm(str(folder), "sdpa", "float32")
    assert not marker.exists()


def test_a_chat_template_reaches_nothing_of_python(folder: Path) -> None:
    """It is rendered in jinja's sandbox."""
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    tokenizer = load_processor(str(folder)).tokenizer
    with pytest.raises(SecurityError, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)


def test_a_yaml_makes_plain_values_alone(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(f"seed: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(ConfigError, match=r"given.yaml is not a yaml file: could not determine a constructor"):
        load_config(str(path))
    assert not marker.exists()
