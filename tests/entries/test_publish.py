"""`recipe/export.py`: the folder is complete, its card says what the run knows, and the hub gets it once, as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig

from convert.shapes import draw_scene
from recipe import Detector
from recipe.checkpoints.base import NETWORK
from recipe.checkpoints.check import contents_sum, manifest_at
from recipe.checkpoints.weights import EVALUATED, find_config, read_weights
from recipe.export import facts_of, main, parse
from recipe.publish.card import write_card
from recipe.publish.trained import TRAINED_FILE, tensor_hash
from tests.support.hub_server import REPOSITORY, TOKEN, Hub, hub_server

ROOT = Path(__file__).parents[2]
CALIBRATED = {"score_scale": 2.0, "score_shift": 0.5, "score_threshold": 0.25}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    path.write_bytes(draw_scene(seed=4, index=1, image_size=100).image)
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "eval.json").write_text(json.dumps({"box_ap": 0.4321, "refcoco_acc": -1.0, "categories": {}}))
    (folder / "calibration.yaml").write_text(yaml.safe_dump({"evaluation": CALIBRATED, "report": {}}))
    return folder


@pytest.fixture(scope="module")
def exported(
    trained_checkpoint: Path, evaluated: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    options = ["--evaluation", str(evaluated), "--example", str(picture), "--license", "apache-2.0"]
    main(parse(["--checkpoint", str(trained_checkpoint), "--out", str(folder), *options]))
    return folder


def test_every_tensor_that_was_trained_is_listed_and_there(exported: Path, trained_checkpoint: Path) -> None:
    listed = json.loads((exported / TRAINED_FILE).read_text())["tensors"]
    weights = {name.removeprefix(NETWORK): value for name, value in read_weights(trained_checkpoint).items()}
    assert listed == {name: tensor_hash(value) for name, value in weights.items()}, "all parts of this run learn"
    assert not {path.suffix for path in exported.iterdir()} & {".bin", ".pt", ".pth", ".pkl", ".pickle", ".msgpack"}


def test_equal_bytes_of_another_kind_have_another_hash() -> None:
    zeros = torch.zeros(2, 4)
    others = (zeros.view(4, 2), zeros.to(torch.bfloat16), zeros.int(), torch.ones(2, 4))
    assert len({tensor_hash(value) for value in (zeros, zeros.clone(), *others)}) == 5
    assert tensor_hash(torch.tensor(1.0)) != tensor_hash(torch.tensor([1.0]))


@pytest.mark.parametrize("fault", ["left out", "in another precision"])
def test_an_export_that_lacks_one_is_refused(
    fault: str, trained_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipe.checkpoints import weights

    save, name = weights.save_file, "detection_head.layers.0.cross_attention.key.weight"

    def faulty(tensors: dict[str, Any], *args: Any, **keywords: Any) -> None:
        assert name in tensors
        tensors = {**tensors, name: tensors[name].bfloat16()}
        if fault == "left out":
            del tensors[name]
        save(tensors, *args, **keywords)

    monkeypatch.setattr("recipe.checkpoints.weights.save_file", faulty)
    with pytest.raises(ValueError, match=rf"lacks 1 of \d+ tensors that the run trained \({name}\): nothing"):
        main(parse(["--checkpoint", str(trained_checkpoint), "--out", str(tmp_path / "out")]))
    assert not list(tmp_path.iterdir())


def test_the_card(exported: Path, picture: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "object-detection",
        "tags": ["qwen-vl", "object-detection", "detr"],
    }
    for line in (
        "# model",
        'detector = Detector.from_pretrained("model")',
        "| box_ap | 0.432 | COCO's AP of boxes, mean over IoU 0.50 to 0.95, whatever their captions |",
        "The scores of boxes are calibrated",
        "- Steps: 2, each of",
        f"torch {torch.__version__.partition('+')[0]}",
        "This model: apache-2.0, as its exporter states.",
        "![scene.png](example.png)",
        "`vllm serve FOLDER` (not run by us)",
    ):
        assert line in card.text, line
    rows = [line.split(" | ") for line in card.text.splitlines() if line.startswith(("| training", "| evaluation"))]
    assert [row[0] for row in rows] == ["| training", "| evaluation"]
    assert all(int(row[2]) > 0 for row in rows), rows
    assert "refcoco_acc" not in card.text and str(picture.parent) not in card.text
    assert Image.open(exported / "example.png").width > 100


def test_the_calibration_is_that_of_the_model(exported: Path, trained_checkpoint: Path, picture: Path) -> None:
    evaluation = find_config(exported).evaluation
    assert {name: getattr(evaluation, name) for name in CALIBRATED} == CALIBRATED
    assert (exported / "calibration.yaml").is_file()
    raw = Detector.from_pretrained(trained_checkpoint)(picture, threshold=0).objects
    found = Detector.from_pretrained(exported)(picture, threshold=0).objects
    logits = torch.logit(torch.tensor([item.score for item in raw], dtype=torch.float64))
    scores = torch.tensor([item.score for item in found], dtype=torch.float64)
    assert torch.allclose((2 * logits + 0.5).sigmoid(), scores, atol=5e-6)  # both have six digits


def test_the_text_path_is_that_of_the_base(exported: Path, tiny_checkpoint: str) -> None:
    """Servers of text read the folder as they do the base."""
    found, base = (AutoTokenizer.from_pretrained(path) for path in (exported, tiny_checkpoint))
    assert found.backend_tokenizer.to_str() == base.backend_tokenizer.to_str()
    assert found.chat_template == base.chat_template and found.special_tokens_map == base.special_tokens_map
    settings = [GenerationConfig.from_pretrained(path).to_dict() for path in (exported, tiny_checkpoint)]
    assert settings[0] == settings[1]


def test_without_an_evaluation(
    trained_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is guessed; a calibration next to the run is named, as it may be of another checkpoint."""
    calibration = trained_checkpoint.parents[1] / "calibration.yaml"
    calibration.write_text(yaml.safe_dump({"evaluation": CALIBRATED, "report": {}}))
    try:
        main(parse(["--checkpoint", str(trained_checkpoint), "--out", str(tmp_path / "out")]))
    finally:
        calibration.unlink()
    assert f"if it is of this checkpoint, give --evaluation {trained_checkpoint.parents[1]}" in caplog.text
    assert find_config(tmp_path / "out").evaluation == find_config(trained_checkpoint).evaluation
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["license"] == "unknown" and "please set it once both are known" in card.text
    assert "are not calibrated" in card.text and not (tmp_path / "out" / "example.png").exists()
    printed = capsys.readouterr().out
    assert "transformers alone gives the text only; these lines give the boxes" in printed
    assert f'detector = Detector.from_pretrained("{tmp_path / "out"}")' in printed


@pytest.mark.parametrize("evaluated", ["this one", "another"])
def test_an_evaluation_of_another_checkpoint_is_refused(
    evaluated: str, trained_checkpoint: Path, tmp_path: Path
) -> None:
    """Whatever the name of the checkpoint: the newest has two."""
    assert trained_checkpoint.is_symlink()
    manifest = manifest_at(str(trained_checkpoint.resolve()))
    assert manifest is not None
    contents = contents_sum(manifest) if evaluated == "this one" else "0" * 64
    (tmp_path / "eval.json").write_text(json.dumps({"box_ap": 0.5, EVALUATED: contents}))
    args = ["--checkpoint", str(trained_checkpoint), "--out", str(tmp_path / "out"), "--evaluation", str(tmp_path)]
    if evaluated == "this one":
        assert facts_of(parse(args)).scores == {"box_ap": 0.5}
        return
    with pytest.raises(ValueError, match=r"eval.json is of another checkpoint than .*: evaluate this one"):
        main(parse(args))
    assert not (tmp_path / "out").exists()


def test_the_peak_of_memory_is_that_of_the_last_run(trained_checkpoint: Path, tmp_path: Path) -> None:
    """Of the run next to the checkpoint; started again, it logs one more."""
    asked = parse(["--checkpoint", str(trained_checkpoint), "--out", "out"])
    path = trained_checkpoint.parents[1] / "metrics.jsonl"
    assert facts_of(asked).peak_gib is None
    lines = [{"metrics": metrics} for metrics in ({"memory/peak_gib": 2.0}, {"loss": 1}, {"memory/peak_gib": 3.5}, {})]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        facts = facts_of(asked)
    finally:
        path.unlink()
    assert facts.peak_gib == 3.5
    write_card(tmp_path, find_config(trained_checkpoint), facts, only_adapters=False)
    assert "- Memory: at its peak 3.5 GiB" in (tmp_path / "README.md").read_text()


def test_a_push_without_a_token_is_refused_before_the_export(
    trained_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipe.publish.hub.get_token", lambda: None)
    asked = ["--checkpoint", str(trained_checkpoint), "--out", str(tmp_path / "out"), "--push-to-hub"]
    with pytest.raises(ValueError, match="--push-to-hub needs a token that may write: set HF_TOKEN"):
        main(parse([*asked, REPOSITORY]))
    with pytest.raises(ValueError, match=r"--push-to-hub a/b/c: is not a name on the hub"):
        main(parse([*asked, "a/b/c"]))
    assert not list(tmp_path.iterdir())


PROGRAM = """
import sys
from pathlib import Path
from recipe.publish.hub import Push, fetch_model
folder = Path(sys.argv[1])
try:
    if sys.argv[2] == "push":
        print(Push.prepare("me/model", public=False).upload(folder))
    else:
        print(fetch_model("me/model"))
except ValueError as error:
    sys.exit(f"error: {error}")
"""


def with_hub(hub: Hub, folder: Path, what: str, home: Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    arguments = [sys.executable, "-c", PROGRAM, str(folder), what]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)


def test_what_is_pushed_is_fetched(exported: Path, tmp_path: Path) -> None:
    """By the hub's own library, over HTTP: every file, private, the token never shown."""
    with hub_server() as hub:
        done = with_hub(hub, exported, "push", tmp_path)
        assert done.stdout.strip() == f"{hub.endpoint}/{REPOSITORY}", done.stderr
        assert hub.files == {path.name: path.read_bytes() for path in exported.iterdir()}
        assert [row["private"] for row in hub.created] == [True]
        assert hub.objects, "large files take the way of large files"
        got = with_hub(hub, exported, "fetch", tmp_path)
        fetched = Path(got.stdout.strip())
        assert fetched.is_dir(), got.stderr
        left_out = {"example.png"}
        assert {path.name for path in fetched.iterdir()} == hub.files.keys() - left_out
        assert all((fetched / name).read_bytes() == hub.files[name] for name in hub.files.keys() - left_out)
        assert TOKEN not in done.stdout + done.stderr + got.stdout + got.stderr


def test_a_card_on_the_hub_stays(exported: Path, tmp_path: Path) -> None:
    with hub_server() as hub:
        hub.files["README.md"] = b"completed by its user"
        done = with_hub(hub, exported, "push", tmp_path)
        assert hub.files["README.md"] == b"completed by its user"
        assert f"{REPOSITORY} keeps the card it has on the hub" in done.stderr
        assert "recipe.yaml" in hub.files


def test_a_token_that_is_refused_is_never_shown(exported: Path, tmp_path: Path) -> None:
    with hub_server() as hub:
        token = "hf_anotherSecretToken"
        done = with_hub(hub, exported, "push", tmp_path, token)
        assert done.returncode == 1 and "the hub does not take the token" in done.stderr
        assert "Traceback" not in done.stderr and token not in done.stdout + done.stderr
        assert not hub.files and not hub.created
        got = with_hub(hub, exported, "fetch", tmp_path, token)
        assert got.returncode == 1 and "nor a model that can be fetched" in got.stderr and token not in got.stderr
