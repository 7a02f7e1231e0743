"""Read a configuration from a yaml file and the command line, and write it back.

A yaml overrides the defaults of `recipe.config`, `key.sub=value` arguments override the yaml. This file and
`recipe.rules`, which checks the result, import neither torch nor Composer: a mistake is reported within a second.
"""

import argparse
import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from recipe.config import (
    REMOVED_KEYS,
    REMOVED_VALUES,
    REPLACED_KEYS,
    ConfigError,
    PromptConfig,
    RecipeConfig,
    nearest,
)
from recipe.redact import is_secret, redact, redact_text, remember_secrets
from recipe.rules import check_config

log = logging.getLogger(__name__)

ALLOWED_PREFIX = "RECIPE_"
ALLOWED_NAMES = ("HOME", "HOSTNAME", "RUN_NAME", "SCRATCH", "SLURM_JOB_ID", "TMPDIR", "USER")
# Keys of other libraries' keywords that hold texts: a run may be called 20261127, a split 2017, a tag `on`.
_TEXTS = {
    "run_name",
    "project",
    "group",
    "name",
    "entity",
    "tags",
    "id",
    "job_type",
    "notes",
    "local",
    "remote",
    "split",
}
_NO_DEFAULT = object()
_TEXT_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # every scalar as text; in C where there is libyaml


def _read_variable(name: str, default: Any = _NO_DEFAULT) -> Any:
    """Return an allowed variable as OmegaConf's own resolver does; errors do not reveal whether others exist."""
    if is_secret(name) or not (name in ALLOWED_NAMES or name.startswith(ALLOWED_PREFIX)):
        raise ValueError(
            f"${{oc.env:{name}}} may not be read, because what is read is saved: only {', '.join(ALLOWED_NAMES)} and "
            f"{ALLOWED_PREFIX}*, unless named like a secret. Rename it to {ALLOWED_PREFIX}..., or write the value "
            "itself; libraries read secrets from their own variables"
        )
    if name in os.environ:
        return os.environ[name]
    if default is _NO_DEFAULT:
        raise KeyError(f"Environment variable '{name}' not found")
    return None if default is None else str(default)


def load_config(yaml_path: str, overrides: Sequence[str] = ()) -> RecipeConfig:
    """Read a configuration: the defaults, overridden by the yaml, overridden by `key.sub=value` texts.

    Raises:
        ConfigError: The yaml cannot be read, a key is unknown, a value is missing or has the wrong type, or an
            environment variable may not be read.
    """
    # OmegaConf's only resolver that reads the machine: ours reads only allowed variables.
    OmegaConf.register_resolver("oc.env", _read_variable, replace=True)
    config = OmegaConf.structured(RecipeConfig)
    config = _merge(config, _read_yaml(yaml_path), yaml_path)
    for override in overrides:  # in order: `groups={}` clears what came before it
        config = _merge(config, _parse_override(override), "the command line")
    try:
        if config.val_fraction is not None and OmegaConf.is_missing(config.eval_loader, "streams"):
            config.eval_loader.streams = {}
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"missing {', '.join(missing)}: set in {yaml_path} or as key=value on the command line")
        loaded = cast(RecipeConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].removeprefix("ValueError raised while resolving interpolation: ")
        raise ConfigError(f"{error.full_key}: {reason}; fix the ${{...}} or set the variable") from error
    remember_secrets(asdict(loaded))
    return _expand_homes(loaded)


def expand_home(text: str) -> str:
    """Return a path or `--flag=PATH` with its leading ~ as the home folder, which shells do at a word's start only."""
    found = re.fullmatch(r"(--[\w-]+=)?(~[^/\s]*(?:/.*)?)", text)
    return text if found is None else (found[1] or "") + os.path.expanduser(found[2])


def _expand_homes(value: Any) -> Any:
    """Expand ~ in all texts of a section but the prompt's."""
    if is_dataclass(value):
        for name, item in vars(value).items():
            setattr(value, name, item if isinstance(item, PromptConfig) else _expand_homes(item))
    if isinstance(value, dict):
        return {name: _expand_homes(item) for name, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_expand_homes(item) for item in cast(list[Any], value)]
    return expand_home(value) if isinstance(value, str) else value


def _as_written(value: Any, text: Any, kind: Any) -> Any:
    """Return a yaml's `value` with its scalars as they were written where text is expected.

    YAML reads the phrases on, off, no as booleans, the name 2026_11 as 202611. One text is a list of one where a list
    is expected.

    Args:
        value: As YAML reads it.
        text: The same with every scalar as text.
        kind: The type of the field that gets it; None in sections of other libraries' keywords.
    """
    if isinstance(value, dict) and isinstance(text, dict):
        items, texts = cast(dict[str, Any], value), cast(dict[str, Any], text)
        kinds: dict[str, Any] = dict.fromkeys(_TEXTS, str | list[str])
        for section in filter(is_dataclass, (kind, *get_args(kind))):  # also if it may be null
            kinds = {entry.name: entry.type for entry in fields(section)}
        if kind == dict[str, str]:
            kinds = dict.fromkeys(items, str)
        return {name: _as_written(item, texts.get(name), kinds.get(name)) for name, item in items.items()}
    if kind not in (str, str | None, list[str], str | list[str]):
        return value
    if kind == list[str] and text and isinstance(text, str) and not text.startswith("${"):
        return [text]
    if isinstance(value, list) and isinstance(text, list):
        pairs = zip(cast(list[Any], value), cast(list[Any], text), strict=True)
        return [_as_written(word if item is None and word else item, word, str) for item, word in pairs]
    return text if isinstance(value, bool | int | float) and isinstance(text, str) else value


def as_saved(
    config: RecipeConfig, max_caption_tokens: int | None = None, classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the configuration as it is saved: without secrets, with what was found in the data.

    `max_caption_tokens` and `classes`, the names for `evaluation.classes`, default to the configuration's.
    """
    saved = redact(asdict(config))
    saved["caption_decoder"]["max_caption_tokens"] = max_caption_tokens or config.caption_decoder.max_caption_tokens
    saved["evaluation"]["classes"] = list(config.evaluation.classes if classes is None else classes)
    return saved


def save_config(
    config: RecipeConfig,
    path: str | Path,
    max_caption_tokens: int | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write the configuration as a yaml that `load_config` reads; see `as_saved`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(as_saved(config, max_caption_tokens, classes), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def _read_yaml(path: str) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
        texts = yaml.load(Path(path).read_bytes(), _TEXT_LOADER)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a yaml file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a yaml file: {_flatten(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold `key: value` sections, not a list: see yamls/ for examples")
    return OmegaConf.create(_as_written(OmegaConf.to_container(loaded), texts, RecipeConfig))


def _parse_override(override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")) or key.startswith("-"):
        raise ConfigError(f"cannot read the argument {override!r}: write key.sub=value, without dashes")
    try:
        parsed, text = OmegaConf.to_container(OmegaConf.from_dotlist([override])), yaml.load(value, _TEXT_LOADER)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read the value of {key}: {_flatten(error)}") from error  # value: maybe a secret
    for name in reversed(key.split(".")):
        text = {name: text}
    return OmegaConf.create(_as_written(parsed, text, RecipeConfig))


def _merge(config: DictConfig, updates: DictConfig, source: str) -> DictConfig:
    sections = {entry.name for entry in fields(RecipeConfig) if callable(entry.default_factory)}
    for name, value in _without_removed(cast(dict[str, Any], OmegaConf.to_container(updates)), source).items():
        # One section at a time: OmegaConf names no key if a section has the wrong type.
        is_section = isinstance(value, dict) or (value is None and name == "detection_head")
        if name in sections and not is_section and not str(value).startswith("${"):
            raise ConfigError(f"{name} in {source} is {value!r}: give it `key: value` lines, or leave it out")
        _clear(config, RecipeConfig, {name: value})
        try:
            config.merge_with({name: value})  # in place: `OmegaConf.merge` copies all sections first, each time
        except ConfigKeyError as error:
            raise ConfigError(f"unknown key {error.full_key} in {source}: {_nearest_key(error)}") from error
        except TypeError as error:  # OmegaConf 2.4.0 for a list where a mapping is expected, and the reverse
            raise ConfigError(_clash(name, config[name], value, source)) from error
        except OmegaConfBaseException as error:
            key = error.full_key or name
            raise ConfigError(f"wrong value of {key} in {source}: {_flatten(str(error).splitlines()[0])}") from error
    return config


def _clear(config: Any, section: Any, updates: dict[str, Any]) -> None:
    """Empty the free mappings that `updates` set to {} or null, such as `callbacks={}`; a merge would keep them."""
    for entry in fields(section):
        value = updates.get(entry.name, _NO_DEFAULT)
        if is_dataclass(entry.type) and isinstance(value, dict) and isinstance(config, DictConfig):
            _clear(config[entry.name], entry.type, value)
        elif value in (None, {}) and get_origin(entry.type) is dict:
            config[entry.name] = updates[entry.name] = {}


def _clash(key: str, node: Any, value: Any, source: str) -> str:
    """Return the message that names the key at which a list meets a mapping."""
    if isinstance(node, DictConfig) and isinstance(value, dict):
        for name, item in value.items():
            inner = None if OmegaConf.is_missing(node, name) else node.get(name)
            if isinstance(item, dict | list) and (isinstance(inner, DictConfig | ListConfig) or inner is None):
                if inner is None or isinstance(inner, DictConfig) != isinstance(item, dict):
                    return _clash(f"{key}.{name}", inner, item, source)
                if isinstance(item, dict):
                    return _clash(f"{key}.{name}", inner, item, source)
    wanted = "`key: value` lines" if isinstance(value, list) else "a list, such as [a, b]"
    return f"{key} in {source} is {value!r}: give it {wanted}"


def _without_removed(updates: dict[str, Any], source: str) -> dict[str, Any]:
    """Return `updates` without keys of older versions that have an equal today; raise ConfigError at all others."""
    for key in (*REMOVED_KEYS, *REPLACED_KEYS, *REMOVED_VALUES):
        section, _, name = key.partition(".")
        values = updates.get(section)
        if not isinstance(values, dict) or name not in values:
            continue
        value = values[name]
        if key in REMOVED_KEYS:
            del values[name]
            if value != (old := REMOVED_KEYS[key]):
                raise ConfigError(
                    f"{key} in {source} is {value!r}: this key was removed; delete it to run with {old!r}"
                )
        elif key in REPLACED_KEYS:
            new, values_of = REPLACED_KEYS[key]
            if not isinstance(value, bool) or value not in values_of or new in values:
                raise ConfigError(
                    f"{key} in {source} is {value!r}: this key was replaced; write {section}.{new} instead"
                )
            del values[name]
            values[new] = values_of[value]
            log.warning(
                "%s in %s is %r: this key was replaced; read as %s.%s: %s",
                key,
                source,
                value,
                section,
                new,
                "its default" if values[new] == {} else json.dumps(values[new]),
            )
        elif value in REMOVED_VALUES[key]:
            raise ConfigError(f"{key} in {source} is {value!r}: this value was removed; delete the key or give another")
    return updates


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
        kinds: list[Any] = [kind for kind in (entry.type, *get_args(entry.type)) if is_dataclass(kind)]  # also if null
        keys += _all_keys(kinds[0], f"{prefix}{entry.name}.") if kinds else [prefix + entry.name]
    return keys


def _flatten(message: object) -> str:
    return " ".join(str(message).split())


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a ConfigError without its traceback and exit with status 2."""
    try:
        yield
    except ConfigError as error:
        # On every rank: if the launcher ends rank 0 before it prints, it shows what the others wrote.
        print(redact_text(f"configuration error: {error}"), file=sys.stderr)
        raise SystemExit(2) from None


def parser_of(usage: str, what: str, examples: str) -> argparse.ArgumentParser:
    """Return the parser of a command that takes a yaml and overrides, and explains both in its --help."""
    parser = argparse.ArgumentParser(
        usage=usage,
        description=what,
        epilog=f"examples:\n{examples}\n\n{_KEYS_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("yaml", metavar="YAML", nargs="?", help="the run's configuration, such as yamls/joint.yaml")
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*", help="override keys of the yaml")
    return parser


_KEYS_HELP = """keys:
  recipe/config.py documents every key with its default and bounds; yamls/ has complete examples.
  trainer, callbacks, loggers, streams, dataset and dataloader hold keywords of Composer, Streaming and torch.
  key.sub=value: nested keys are joined by dots. null switches off or drops a key, {} takes its defaults,
  lists and sections are quoted: 'prompt.candidate_phrases=[a cat,a dog]' 'callbacks.lr_monitor={}'"""


def from_command_line(
    parser: argparse.ArgumentParser, arguments: Sequence[str], required: Sequence[str] = ()
) -> tuple[RecipeConfig, argparse.Namespace]:
    """Return the checked configuration that a command line names, and the parsed options.

    `parser` is from `parser_of`, perhaps with more options. `required` are top-level keys that may not be null.
    """
    args, unknown = parser.parse_known_intermixed_args([expand_home(argument) for argument in arguments])
    world_size = getattr(args, "world_size", None)  # of `recipe.estimate`, which no launcher starts
    if world_size is not None and world_size < 1:
        raise ConfigError(f"--world-size is {world_size}: give 1 or more")
    if args.yaml is None or "=" in args.yaml:
        raise ConfigError("no YAML is given: name one first, such as yamls/joint.yaml; --help shows examples")
    args.overrides += unknown
    config = load_config(args.yaml, args.overrides)
    check_config(config, world_size)
    for key in required:
        if getattr(config, key) is None:
            raise ConfigError(f"missing {key}: add {key}=VALUE to the command")
    return config, args
