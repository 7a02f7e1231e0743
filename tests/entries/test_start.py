"""How the entries start: their --help and their own mistakes are reported before any heavy library is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "composer", "transformers", "streaming", "numpy")
JOINT = "yamls/joint.yaml"
# Runs an entry as `python recipe/X.py` does, and prints which heavy libraries it had imported at its end.
RUN = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported", [name for name in {HEAVY} if name in sys.modules]))
sys.argv = sys.argv[1:]
sys.path[0] = "recipe"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["train", "eval", "predict", "export", "estimate"])
def test_help_is_complete_and_imports_nothing_heavy(name: str) -> None:
    done = run(f"recipe/{name}.py", "--help")
    assert done.returncode == 0 and done.stdout.rstrip().endswith("imported []")
    assert done.stderr == ""
    for word in ("usage:", "examples:", f"recipe{'.' if name == 'estimate' else '/'}{name}", "recipe/config.py"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train.py"], "no YAML is given"),
        (["train.py", JOINT, "sead=1"], "unknown key sead"),
        (["train.py", JOINT, "detection_head.dropout=2"], "detection_head.dropout is 2.0: it must be between 0 and 1"),
        (["train.py", JOINT, "trainer.max_duration=soon"], "trainer.max_duration is 'soon'"),
        (["train.py", JOINT, "callbacks.lr_moniter={}"], "did you mean lr_monitor"),
        (["train.py", JOINT, "staged_freezing.groups.llm=[{from: 1, lr: 1}]"], "groups.llm[0].from is 1"),
        (["train.py", JOINT, "trainer.parallelism_config.fsdp.state_dict_type=x"], "fsdp.state_dict_type is 'x'"),
        (["eval.py", JOINT], "missing load_path"),
        (["train.py", JOINT, "optimizer.betas={a: 1}"], "optimizer.betas in the command line is {'a': 1}: give it a l"),
        (["estimate.py", JOINT, "--world-size", "3"], "global_batch_size 8 cannot be shared by 3 ranks"),
        (["predict.py", "--checkpoint", "x", "--out", "y", "z", "--config", "no.yaml"], "cannot read no.yaml"),
        (["export.py", "--checkpoint", "x", "--out", "y", "--config", "no.yaml"], "cannot read no.yaml"),
        (["predict.py", "--checkpoint", "x", "--out", "y", "z", "--nms-iou", "3"], "--nms-iou 3.0"),
        (["gallery.py", "--predictions", "x", "--out", "y", "--split", "val"], "--split needs --data FOLDER"),
    ],
)
def test_a_mistake_is_reported_before_anything_heavy_is_imported(arguments: list[str], expected: str) -> None:
    done = run(f"recipe/{arguments[0]}", *arguments[1:])
    assert done.returncode in (1, 2) and expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.strip() == "imported []"


def test_a_bound_in_a_config_given_to_predict_is_judged_first(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load((ROOT / JOINT).read_text()), "evaluation": {"score_threshold": 3}})
    )
    done = run("recipe/predict.py", "--checkpoint", "x", "--out", "y", "z", "--config", f"{tmp_path}/run.yaml")
    assert done.returncode == 2 and "evaluation.score_threshold is 3.0" in done.stderr
    assert done.stdout.strip() == "imported []"


def test_errors_that_need_the_libraries_or_the_machine_have_no_traceback_either() -> None:
    missing = ["trainer.device=cpu", *(f"{name}_loader.streams.main.local=no/such" for name in ("train", "eval"))]
    for overrides, expected in (
        (["trainer.max_duratoin=1ep"], "unknown key trainer.max_duratoin: did you mean max_duration"),
        (missing, "eval_loader.streams.main.local: no/such/val does not exist: convert a data set into it"),
    ):
        done = run("recipe/train.py", JOINT, *overrides)
        assert done.returncode == 2 and expected in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import recipe.predict", "composer"),
        ("from recipe import Detector; Detector", "composer"),
        ("import recipe.schema", "torch"),
    ],
)
def test_what_a_module_does_without(statement: str, unwanted: str) -> None:
    program = f"import sys; {statement}; sys.exit({unwanted!r} in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0, f"{statement} imports {unwanted}"
