"""Which environment variables a configuration may read: `${oc.env:NAME}` puts a value where it is logged and saved."""

import os
from typing import Any

from omegaconf import OmegaConf

from recipe.redact import is_secret

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
