"""Check that `tests/benchmarks/real_size.py` runs with the tiny model and ends with its line of JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig

import real_size
from recipe.models.vlm import load_vlm
from recipe.tiny import build_tiny_checkpoint
from tests.launches.launch import run_composer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write five images with an object each; return their set."""
    images = tmp_path / "source" / "images"
    images.mkdir(parents=True)
    truth: dict[str, Any] = {"categories": [{"id": 1, "name": "square"}], "images": [], "annotations": []}
    for number in range(5):
        Image.new("RGB", (84, 84), (40 * number, 90, 120)).save(images / f"{number}.png")
        truth["images"].append({"id": number, "file_name": f"{number}.png", "width": 84, "height": 84})
        truth["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [10, 10, 30, 40], "area": 1200, "iscrowd": 0}
        )
    (images.parent / "instances.json").write_text(json.dumps(truth))
    return images.parent


@pytest.mark.drill
def test_it_ends_with_its_figures(source: Path, tmp_path: Path) -> None:
    places = ("--source", str(source), "--folder", str(tmp_path / "bench"), "--tokenizer", "none")
    arguments = ("--size", "tiny", "--legs", "head", "full", "--tokens", "512", *places)
    output = run_composer(0, "tests/benchmarks/real_size.py", *arguments, timeout=1200).output
    report = json.loads(output.splitlines()[-1])
    assert report["legs"].keys() == {"head", "full"} and report["legs"]["full"].keys() == {"estimate_gb"}
    names = {"seconds_per_step", "tokens_per_s", "peak_rss_gb", "estimate_gb", "checkpoint_gb", "export_peak_gb"}
    assert report["legs"]["head"].keys() == names and min(report["legs"]["head"].values()) > 0
    assert report["head_speedup_cached"] > 0 < report["head_speedup_without_answers"]
    assert 0 < report["lm_loss_memory_ratio"] < 1


def test_a_checkpoint_in_the_layout_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards in bfloat16 with an index and the prefixes of old releases, tied; it loads whole."""
    build_tiny_checkpoint(str(tmp_path / "tiny"))
    expected = load_vlm(str(tmp_path / "tiny"), "sdpa", "float32").state_dict()
    monkeypatch.setattr(real_size, "SHARD_BYTES", 10**6)
    monkeypatch.setattr(real_size, "model_config", lambda name: AutoConfig.from_pretrained(tmp_path / "tiny"))
    folder = tmp_path / "made"
    build_tiny_checkpoint(str(folder))
    (folder / "model.safetensors").unlink()
    real_size.write_weights("any", folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert "visual.merger.mlp.0.weight" in index["weight_map"] and "model.embed_tokens.weight" in index["weight_map"]
    assert "lm_head.weight" not in index["weight_map"]
    with safe_open(folder / index["weight_map"]["visual.merger.mlp.0.weight"], "pt") as shard:
        assert shard.get_tensor("visual.merger.mlp.0.weight").dtype == torch.bfloat16
    found = load_vlm(str(folder), "sdpa", "float32").state_dict()
    assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in expected.items()}
