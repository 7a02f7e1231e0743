"""Remove secrets from a configuration or any text before it is written anywhere."""

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"
_SECRET_WORDS = {
    *("key", "apikey", "token", "password", "passwd", "pwd", "passphrase", "secret", "secrets", "credential"),
    *("credentials", "authorization", "sig", "signature"),
}
_USER_INFO = re.compile(r"(?<=://)[^/\s]+(?=@)")
_QUERY_VALUE = re.compile(
    r"(?<=[?&])([^=&#\s]*(?:key|token|password|secret|credential|sig(?:nature)?)[^=&#\s]*=)[^&#\s]+", re.I
)
# `api_key=x` and `'api_key': 'x'`, but not the `key=` of Python's sort, which every other traceback shows.
_ASSIGNED = re.compile(
    r"(?<![\w-])(?!key\b)(?P<name>[\w.-]+)(?P<sign>=|[\"']\s?:\s?)(?:\"[^\"]*\"|'[^']*'|[^\s\"',;&{\[(]+)", re.ASCII
)
_WORKING_DIRECTORY = "PWD"  # set by every shell; elsewhere the word means a password
_SHORTEST_SECRET = 6  # an environment variable such as SSH_KEY=1 must not blank every 1

_remembered: set[str] = set()


def remember_secrets(value: Any, name: str = "") -> None:
    """Remember the secrets of nested dicts and lists, so that `redact` hides them in any text.

    Libraries report parts of an address: of `s3://KEY:SECRET@host` boto names the bucket `KEY:SECRET`.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            remember_secrets(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            remember_secrets(item, name)
    elif isinstance(value, str):
        users = _USER_INFO.findall(value)
        parts = [part for user in users for part in (user, *user.split(":"))] + ([value] if is_secret(name) else [])
        _remembered.update(part for part in parts if len(part) >= _SHORTEST_SECRET)


def redact(value: Any) -> Any:
    """Return a copy of nested dicts and lists without secrets.

    Replaces whatever a secret-looking key holds (`api_key`, not `max_new_tokens`), and the user and query secrets of
    addresses. Replaces in any text the environment variables with such a name and what `remember_secrets` was given.
    """
    secrets = {
        text
        for name, text in os.environ.items()
        if is_secret(name) and name != _WORKING_DIRECTORY and len(text) >= _SHORTEST_SECRET
    }
    return _redact(value, sorted(secrets | _remembered, key=len, reverse=True))


def redact_text(text: str) -> str:
    """Return a log line, an error or a traceback without secrets: as `redact`, and the values of `api_key=...`."""
    return _ASSIGNED.sub(
        lambda match: f"{match['name']}{match['sign']}{REDACTED}" if is_secret(match["name"]) else match[0],
        redact(text),
    )


def is_secret(name: str) -> bool:
    """Return whether a name is of a secret: `apiKey` and `HF_TOKEN` are, `max_new_tokens` is not."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return not _SECRET_WORDS.isdisjoint(re.split(r"[^a-z0-9]+", words))


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: REDACTED if item is not None and is_secret(str(key)) else _redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, REDACTED)
        return _QUERY_VALUE.sub(rf"\1{REDACTED}", _USER_INFO.sub(REDACTED, value))
    return value
