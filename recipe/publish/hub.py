"""The Hugging Face hub: fetch a model's folder, and push one."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from recipe.redact import redact_text

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILES = ["*.safetensors", "*.json", "*.yaml", "*.txt", "*.jinja", "*.md"]  # no pickles


def is_hub_name(name: str) -> bool:
    """Return whether a name can be one on the hub and is not a local path."""
    return bool(_NAME.fullmatch(name)) and not name.endswith(".pt") and not Path(name).exists()


def fetch_model(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a model on the hub, downloaded unless it is there already.

    Raises:
        ValueError: It is not there, or the hub cannot be reached.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"{name!r} is neither a local folder nor a model that can be fetched from the hub ({reason(error)}): give "
            "the folder of an export, or check the name, the network, HF_TOKEN and HF_HUB_OFFLINE"
        ) from error


def reason(error: Exception) -> str:
    """Return the first line of what the hub's library says, without secrets."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact_text(lines[0] if lines else type(error).__name__)
