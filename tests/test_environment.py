"""`${oc.env:NAME}`: what a configuration may read of the machine."""

from pathlib import Path

import pytest

from recipe.config import ConfigError, RecipeConfig
from recipe.configure import load_config
from recipe.redact import redact_text

SECRET = "hunter2hunter2"
YAML = """
model: {pretrained_model_name_or_path: x}
prompt: {system: env}
train_loader: {streams: {a: {local: y}}, global_batch_size: 1}
eval_loader: {streams: {a: {local: y}}, global_batch_size: 1}
"""


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "RECIPE_STORE_PASSWORD"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("RECIPE_FOLDER", "chosen")
    monkeypatch.setenv("RUN_NAME", "7")


def load(folder: Path, run_folder: str, *overrides: str) -> RecipeConfig:
    (folder / "run.yaml").write_text(f"run_folder: {run_folder}\n{YAML}")
    return load_config(str(folder / "run.yaml"), overrides)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:AWS_SECRET_ACCESS_KEY}",
        "runs/${oc.env:AWS_SECRET_ACCESS_KEY}/a",
        "${oc.env:AWS_SECRET_ACCESS_KEY,none}",
        "${oc.env:NOT_SET_AT_ALL,none}",
        "${oc.decode:${oc.env:AWS_SECRET_ACCESS_KEY}}",
        "${oc.env:RECIPE_FOLDER,${oc.env:AWS_SECRET_ACCESS_KEY}}",
        "${oc.${prompt.system}:AWS_SECRET_ACCESS_KEY}",
        "${oc.env:RECIPE_STORE_PASSWORD}",
    ],
)
@pytest.mark.parametrize("source", ["yaml", "command line"])
def test_other_variables_are_refused(value: str, source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run_folder: \$\{oc.env:\w+\} may not be read.*Rename it") as error:
        load(tmp_path, f'"{value}"') if source == "yaml" else load(tmp_path, "x", f"run_folder={value}")
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)


def test_the_key_is_named_wherever_it_stands(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^loggers\.wandb\.init_kwargs\.notes\[1\]: .*oc.env:AWS_SECRET_ACCESS_KEY"):
        load(tmp_path, "x", "loggers.wandb.init_kwargs.notes=[a,'${oc.env:AWS_SECRET_ACCESS_KEY}']")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("${oc.env:RECIPE_FOLDER}/${oc.env:RUN_NAME}", "chosen/7"),
        ("${oc.env:RECIPE_NOT_SET,else}", "else"),
        ("${oc.env:RECIPE_NOT_SET,${oc.env:RECIPE_FOLDER}}", "chosen"),
        ("${oc.decode:${oc.env:RUN_NAME}}", "7"),
    ],
)
def test_allowed_variables_are_read(value: str, expected: str, tmp_path: Path) -> None:
    assert load(tmp_path, f'"{value}"').run_folder == expected


def test_no_other_resolver_reads_the_machine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run_folder: Unsupported interpolation type env"):
        load(tmp_path, '"${env:AWS_SECRET_ACCESS_KEY}"')


def test_a_value_that_cannot_be_read_is_not_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cannot read the value of loggers.wandb.api_key: ") as error:
        load(tmp_path, "x", "loggers.wandb.api_key={sesame")
    assert "sesame" not in str(error.value)


def test_secrets_of_a_configuration_are_known_in_any_text(tmp_path: Path) -> None:
    remote = "s3://AKIDEXAMPLE:sesame-street@host/data"
    load(tmp_path, "x", f"train_loader.streams.a.remote={remote}", "loggers.wandb.api_key=opensesame")
    told = redact_text('Invalid bucket name "AKIDEXAMPLE:sesame-street"; AKIDEXAMPLE may not; refused opensesame')
    assert told == 'Invalid bucket name "<redacted>"; <redacted> may not; refused <redacted>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unknown key wandb.api_key=sesame in run.yaml", "unknown key wandb.api_key=<redacted> in run.yaml"),
        ("{'api_key': 'a b', 'lr': 1}", "{'api_key': <redacted>, 'lr': 1}"),
        ("from https://user:word@host/a?token=b&part=2", "from https://<redacted>@host/a?token=<redacted>&part=2"),
        ("https://user:w@rd@host/a?sv=1&sig=b", "https://<redacted>@host/a?sv=1&sig=<redacted>"),
        ("{'Authorization': 'Bearer b'}", "{'Authorization': <redacted>}"),
        ("max_new_tokens=5 sorted(names, key=len) KeyError: 'token: none'", None),
    ],
)
def test_secrets_are_found_in_text(text: str, expected: str | None) -> None:
    assert redact_text(text) == (expected or text)
