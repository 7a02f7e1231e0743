"""The Hugging Face hub: fetch a model's folder, and push one."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from recipe.redact import REDACTED, redact_text

log = logging.getLogger(__name__)

_CARD = "README.md"
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


@dataclass(frozen=True)
class Push:
    """A repository on the hub that the token may write to."""

    name: str
    public: bool
    api: HfApi

    @classmethod
    def prepare(cls, name: str, public: bool) -> "Push":
        """Check name and token before any work is done.

        Raises:
            ValueError: There is no token, the hub refuses it, or the name cannot be one on the hub.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"--push-to-hub {name}: is not a name on the hub, such as user/model")
        token = get_token()
        if token is None:
            raise ValueError("--push-to-hub needs a token that may write: set HF_TOKEN, or run `huggingface-cli login`")
        api = HfApi(token=token)
        try:
            api.whoami()
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ValueError(
                f"--push-to-hub {name}: the hub does not take the token ({reason(error)}): check HF_TOKEN and network"
            ) from error
        return cls(name, public, api)

    def upload(self, folder: Path) -> str:
        """Create the repository, private unless `public`, upload the folder and return its address.

        A card that is there already stays as it is: its user may have written it.

        Raises:
            ValueError: The hub refuses it, or cannot be reached.
        """
        try:
            self.api.create_repo(self.name, private=not self.public, exist_ok=True)
            has_card = self.api.file_exists(self.name, _CARD)
            self.api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message="Export of a trained model",
                ignore_patterns=[_CARD] if has_card else None,
            )
        except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
            raise ValueError(
                f"{folder} is written, but cannot be pushed to {self.name} ({reason(error)}): upload it with "
                f"`huggingface-cli upload {self.name} {folder}`"
            ) from error
        if has_card:
            log.warning("%s keeps the card it has on the hub: the new one is %s/%s", self.name, folder, _CARD)
        return f"{self.api.endpoint}/{self.name}"


def reason(error: Exception) -> str:
    """Return the first line of what the hub's library says, without secrets."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text, token = redact_text(lines[0] if lines else type(error).__name__), get_token()
    return text.replace(token, REDACTED) if token else text
