"""`recipe.checkpoints.weights.export_model` and `recipe/export.py`: transformers and the recipe load it."""

import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, Qwen2_5_VLForConditionalGeneration

from convert.shapes import draw_scene
from recipe.checkpoints.weights import CONFIG_FILE, HEAD_FILE, export_model, find_config, read_weights
from recipe.config import REMOVED_KEYS, ConfigError, ImageConfig, RecipeConfig
from recipe.configure import load_config
from recipe.data.image import image_spec, patchify
from recipe.export import main, parse
from recipe.load import load_processor
from recipe.models.vlm import ImageEmbedding
from recipe.schema import Example
from recipe.tiny import build_tiny_checkpoint
from tests.support.tiny_cases import OTHER_FAMILIES, collator, load_model, make_model

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Locate every object."}]}]


@pytest.fixture(scope="module")
def exported(trained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    main(parse(["--checkpoint", str(trained_checkpoint), "--out", str(folder)]))
    return folder


def logits(vlm: PreTrainedModel, processor: Any) -> Tensor:
    """Of an image and a question, all through transformers, in float64."""
    picture = Image.open(BytesIO(draw_scene(seed=1, index=0, image_size=100).image))
    text = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    if isinstance(vlm.model.visual.patch_embed, ImageEmbedding):  # reads one of the two equal frames
        frames = inputs["pixel_values"].unflatten(1, (3, 2, -1))
        inputs["pixel_values"] = frames[:, :, 0].flatten(1)
    with torch.no_grad():
        return deepcopy(vlm).double().eval()(**inputs).logits


def with_attention(config: RecipeConfig, attn_implementation: str) -> RecipeConfig:
    return replace(config, model=replace(config.model, attn_implementation=attn_implementation))


def test_every_file_has_the_mode_of_the_umask(exported: Path):
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir() if path.is_file()} == {0o666 & ~mask}


def test_an_export_that_fails_leaves_nothing(trained_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = parse(["--checkpoint", str(trained_checkpoint), "--out", str(tmp_path / "new")])

    def fail(*args: Any, **keywords: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="No space"):
        broken.setattr("recipe.checkpoints.weights.save_file", fail)
        main(asked)
    assert not list(tmp_path.iterdir())
    main(asked)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_transformers_computes_what_the_checkpoint_does(exported: Path, trained_checkpoint: Path):
    """Plain `from_pretrained`, which takes sdpa: so the checkpoint's model does too.

    The same weights, to the bit; logits may differ by rounding, as the patch embedding is a convolution over two
    frames there.
    """
    config = with_attention(find_config(trained_checkpoint), "sdpa")
    model, processor, _ = load_model(trained_checkpoint, config)
    plain = AutoModelForImageTextToText.from_pretrained(exported)
    weights, expected = plain.state_dict(), model.model.vlm.hf_model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    found = logits(plain, AutoProcessor.from_pretrained(exported))
    assert float((found - logits(model.model.vlm.hf_model, processor)).abs().max()) <= 5e-14  # measured: 5.3e-15
    base = AutoModelForImageTextToText.from_pretrained(config.model.pretrained_model_name_or_path)
    assert not torch.allclose(found, logits(base, processor)), "training has moved the weights"


@pytest.mark.parametrize("tied", [True, False])
def test_output_matrix_survives(tied: bool, tiny_config: Callable[..., RecipeConfig], tmp_path: Path):
    """Tied as in the 3B or not as in the 7B; from the base through a checkpoint's weights to the export, exactly."""
    base = str(tmp_path / "base")
    build_tiny_checkpoint(base, 64, 1, 32, 1, vocab_size=320, tie_word_embeddings=tied)
    attention = {"pretrained_model_name_or_path": base, "dtype": "float32", "attn_implementation": "sdpa"}
    config = tiny_config(model=attention)
    trained = make_model(config)
    with torch.no_grad():
        trained.model.vlm.hf_model.lm_head.weight.mul_(1.5)
    torch.save({"state": {"model": trained.state_dict()}}, tmp_path / "trained.pt")

    model, processor, _ = load_model(tmp_path / "trained.pt", config)
    export_model(model.model, processor, config, tmp_path / "export")
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "export")
    for vlm in (model.model.vlm.hf_model, again):
        assert (vlm.lm_head.weight is vlm.get_input_embeddings().weight) == tied
        assert torch.equal(vlm.lm_head.weight, trained.model.vlm.hf_model.lm_head.weight)
        difference = logits(vlm, processor) - logits(trained.model.vlm.hf_model, processor)
        assert float(difference.abs().max()) <= 5e-14  # measured: 5.3e-15


@OTHER_FAMILIES
def test_other_families(exported: Path, trained_checkpoint: Path):
    """Trained, exported, read by transformers and by the recipe."""
    test_transformers_computes_what_the_checkpoint_does(exported, trained_checkpoint)
    test_export_loads_back_whole(exported, trained_checkpoint)


def test_export_loads_back_whole(exported: Path, trained_checkpoint: Path):
    model, _, config = load_model(exported)
    expected = read_weights(trained_checkpoint)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert model.model.vlm.hf_model.name_or_path == str(exported)
    assert config == find_config(trained_checkpoint)  # the configuration is that of the run
    head = load_file(exported / HEAD_FILE)
    assert {name.split(".")[0] for name in head} == {"memory", "detection_head", "caption_decoder"}
    assert head.keys() == {name[len("model.") :] for name in expected if ".vlm." not in name}


def test_nothing_in_the_export_needs_the_recipe(exported: Path):
    config = json.loads((exported / "config.json").read_text())
    assert "attn" not in json.dumps(config)
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained(exported).config._attn_implementation == "sdpa"


def test_pixel_budget_of_the_run_is_exported(exported: Path, tmp_path: Path):
    """An image above the run's budget, below the base's: transformers' processor now reduces it as the run did."""
    model, processor, config = load_model(exported)
    config = replace(config, image=ImageConfig(min_pixels=56 * 56, max_pixels=112 * 112))
    export_model(model.model, processor, config, tmp_path)
    picture = Image.open(BytesIO(draw_scene(seed=1, index=0, image_size=200).image))
    found = AutoProcessor.from_pretrained(tmp_path).image_processor(picture, return_tensors="pt")["image_grid_thw"]
    _, expected = patchify(picture, image_spec(processor.image_processor, config.image))
    assert found[0].tolist() == list(expected) == [1, 8, 8]
    found = image_spec(load_processor(str(exported)).image_processor, ImageConfig())
    assert found.max_pixels > 200 * 200, "the loaded processor is left as it was"


def test_secrets_are_not_exported(exported: Path, tmp_path: Path):
    model, processor, config = load_model(exported)
    config = replace(config, loggers={"wandb": {"init_kwargs": {"api_key": "hunter2hunter2"}}})
    export_model(model.model, processor, config, tmp_path)
    assert "hunter2" not in (tmp_path / "recipe.yaml").read_text()
    assert load_config(str(tmp_path / "recipe.yaml")).detection_head == config.detection_head


def test_an_export_of_before_a_key_was_removed(exported: Path, tmp_path: Path):
    """It loads if such a key held its default; any other value is refused by name."""
    shutil.copytree(exported, folder := tmp_path / "old")
    saved = yaml.safe_load((folder / CONFIG_FILE).read_text())
    for key, default in REMOVED_KEYS.items():
        section, name = key.split(".")
        saved[section][name] = default
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(saved))
    assert load_model(folder)[2].evaluation == load_model(exported)[2].evaluation
    saved["evaluation"]["num_beams"] = 3
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match=r"evaluation.num_beams in .*recipe.yaml is 3: this key was removed"):
        load_model(folder)


def test_an_export_of_before_the_pyramid(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], tmp_path: Path
):
    """Its configuration has other keys: it predicts what it did; one that selected vision tokens is refused."""
    config = tiny_config(detection_head={"multi_scale": False, "select_queries": False})
    model = make_model(config).eval()
    export_model(model.model, load_processor(config.model.pretrained_model_name_or_path), config, tmp_path)
    assert not any(
        "pyramid" in name or "proposal" in name or "map_" in name for name in load_file(tmp_path / HEAD_FILE)
    )
    saved = yaml.safe_load((tmp_path / CONFIG_FILE).read_text())
    del saved["detection_head"]["multi_scale"]
    saved["detection_head"]["patch_features"] = False
    saved["run_folder"] = "unread"
    for loader in ("train_loader", "eval_loader"):
        saved[loader] |= {"global_batch_size": 1, "streams": {}}
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(saved))
    batch = collator("packed")([tiny_examples["two"]])
    with torch.no_grad():
        found, expected = (made.eval()(batch).detection for made in (load_model(tmp_path)[0], model))
    for name in ("pred_boxes", "pred_objectness"):
        # Products of loaded weights may be summed in another order.
        assert float((getattr(found, name) - getattr(expected, name)).abs().max()) <= 1e-12
    saved["detection_head"]["select_queries"] = True
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(saved))
    with pytest.raises(
        ConfigError, match=r"detection_head\.select_queries .* \(in older versions: from vision tokens\)"
    ):
        load_model(tmp_path)


def test_full_folder_is_left_alone(exported: Path, trained_checkpoint: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty: give the export a folder of its own"):
        main(parse(["--checkpoint", str(trained_checkpoint), "--out", str(tmp_path)]))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_misfitting_head_is_told(exported: Path):
    config = load_config(str(exported / "recipe.yaml"))
    assert config.detection_head is not None
    config = replace(config, detection_head=replace(config.detection_head, num_queries=9))
    with pytest.raises(ValueError, match=r"detection_head\.safetensors does not fit .* instead of \(9, 32\)"):
        load_model(exported, config)
