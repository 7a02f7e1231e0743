"""Read a configuration from a yaml file and the command line, and write it back.

A yaml overrides the defaults of `recipe.config`, `key.sub=value` arguments override the yaml.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from recipe.config import ConfigError, RecipeConfig, nearest
from recipe.redact import is_secret, redact, remember_secrets

ALLOWED_PREFIX = "RECIPE_"
ALLOWED_NAMES = ("HOME", "HOSTNAME", "RUN_NAME", "SCRATCH", "SLURM_JOB_ID", "TMPDIR", "USER")
_NO_DEFAULT = object()


def guard_environment() -> None:
    """From here on `${oc.env:NAME}` reads the allowed variables only, however it is nested or written.

    It is the one resolver of OmegaConf that reads the machine. The library's own is replaced for the whole process.
    """
    OmegaConf.register_resolver("oc.env", _read_variable, replace=True)


def _read_variable(name: str, default: Any = _NO_DEFAULT) -> Any:
    """Like OmegaConf's own, of allowed names.

    Raises:
        ValueError: The name is not allowed; whether the variable exists is not told.
        KeyError: The variable is not set, and there is no default.
    """
    if is_secret(name) or not (name in ALLOWED_NAMES or name.startswith(ALLOWED_PREFIX)):
        raise ValueError(
            f"${{oc.env:{name}}} may not be read, for what is read is saved: only {', '.join(ALLOWED_NAMES)} and "
            f"{ALLOWED_PREFIX}*, without a secret's name. Rename it to {ALLOWED_PREFIX}..., or write the value itself; "
            "the libraries read secrets from variables of their own"
        )
    if name in os.environ:
        return os.environ[name]
    if default is _NO_DEFAULT:
        raise KeyError(f"Environment variable '{name}' not found")
    return None if default is None else str(default)


def load_config(yaml_path: str, overrides: Sequence[str] = ()) -> RecipeConfig:
    """Reads a run's configuration: the defaults, overridden by the yaml, overridden by `key.sub=value` texts.

    Raises:
        ConfigError: The yaml is missing or no yaml, a key is unknown, a value has the wrong type or is missing, or it
            asks for an environment variable that may not be read (see `recipe/configure.py`).
    """
    guard_environment()
    config = OmegaConf.structured(RecipeConfig)
    config = _merge(config, _read_yaml(yaml_path), yaml_path)
    config = _merge(config, _parse_overrides(overrides), "the command line")
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"missing {', '.join(missing)}: set in {yaml_path} or as key=value on the command line")
        loaded = cast(RecipeConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].removeprefix("ValueError raised while resolving interpolation: ")
        raise ConfigError(f"{error.full_key}: {reason}; mend the ${{...}} or set the variable") from error
    remember_secrets(asdict(loaded))
    return loaded


def save_config(config: RecipeConfig, path: str | Path) -> None:
    """Writes the resolved configuration as a yaml that `load_config` reads, secrets replaced by `<redacted>`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(redact(asdict(config)), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _read_yaml(path: str) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a yaml file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no yaml: {_flatten(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold `key: value` sections, not a list: see yamls/ for examples")
    return loaded


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not all(key.split(".")) or key.startswith("-"):
            raise ConfigError(f"cannot read the argument {override!r}: write key.sub=value, without dashes")
        try:
            OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"cannot read the value of {key}: {_flatten(error)}") from error  # it may be a secret
    return OmegaConf.from_dotlist(list(overrides))


def _merge(config: DictConfig, updates: DictConfig, source: str) -> DictConfig:
    sections = {entry.name for entry in fields(RecipeConfig) if callable(entry.default_factory)}
    for name, value in cast(dict[str, Any], OmegaConf.to_container(updates)).items():
        # One section at a time: OmegaConf names no key where a section is of the wrong kind.
        if name in sections and not isinstance(value, dict) and not str(value).startswith("${"):
            raise ConfigError(f"{name} in {source} is {value!r}: give it `key: value` lines, or leave it out")
        try:
            config = cast(DictConfig, OmegaConf.merge(config, {name: value}))
        except ConfigKeyError as error:
            raise ConfigError(f"unknown key {error.full_key} in {source}: {_nearest_key(error)}") from error
        except OmegaConfBaseException as error:
            key = error.full_key or name
            raise ConfigError(f"wrong value of {key} in {source}: {_flatten(str(error).splitlines()[0])}") from error
    return config


def _nearest_key(error: ConfigKeyError) -> str:
    section = cast(type, error.object_type)
    names = [entry.name for entry in fields(section)]
    if not difflib.get_close_matches(str(error.key), names, n=1):
        elsewhere = [key for key in _all_keys(RecipeConfig) if key.split(".")[-1] == error.key]
        if elsewhere:
            return f"did you mean {' or '.join(elsewhere)}?"
    return nearest(str(error.key), names)


def _all_keys(section: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for entry in fields(section):
        kind: Any = entry.type
        keys += _all_keys(kind, f"{prefix}{entry.name}.") if is_dataclass(kind) else [prefix + entry.name]
    return keys


def _flatten(message: object) -> str:
    return " ".join(str(message).split())
