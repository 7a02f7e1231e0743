"""Store the jobs of the convergence benchmark on real sets: each is one training and one small JSON file.

A job is found again by its settings and by the code that decides its result. A file is complete or absent, so a killed
job starts again. Results of other code stay next to each other.
"""

import glob
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recipe.records import write_whole

ROOT = Path(__file__).resolve().parents[2]
SHARED_CODE = ("tests/benchmarks/real_sets.py", "recipe/metrics/boxes.py", "recipe/metrics/gather.py")
OUR_CODE = ("recipe/**/*.py", "yamls/quickstart.yaml", "tests/benchmarks/our_head.py")
PEER_CODE = ("tests/benchmarks/peer_detr.py", "recipe/data/augment.py", "recipe/data/words.py", "recipe/data/image.py")
PACKAGES = ("torch", "torchvision", "transformers", "mosaicml")


class ResultError(ValueError):
    """A file in the folder of results is not one."""


@dataclass(frozen=True)
class Job:
    """One training and its evaluation.

    Attributes:
        set: Name of the set.
        task: What is learned.
        model: `ours`, that with the name of a variant, or the name of a peer.
        seed: Of the weights and of the order of images.
        part: `test`, or `choice` of learning rates; see `real_sets.split_set`.
        rate: Factor on all of the model's learning rates.
        settings: All else that the result depends on.
    """

    set: str
    task: str
    model: str
    seed: int
    part: str
    rate: float
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the job in words."""
        rate = f", choice of the rate {self.rate:g}" if self.part == "choice" else ""
        return f"{self.set}, {self.task}, {self.model}, seed {self.seed}{rate}"

    @property
    def stem(self) -> str:
        """Return the start of its file name, which other settings share."""
        rate = f"-rate-{self.rate:g}" if self.part == "choice" else ""
        return f"{self.set}-{self.task}-{self.model.replace(' ', '_')}-{self.seed}{rate}"

    def described(self) -> dict[str, Any]:
        """Return all settings in JSON's types."""
        own = {name: value for name, value in vars(self).items() if name != "settings"}
        return json.loads(json.dumps({**own, **self.settings}))

    def file_name(self, code: str) -> str:
        """Return the name of its result's file."""
        return f"{self.stem}-{digest(json.dumps(self.described(), sort_keys=True).encode())}-{code}.json"


@dataclass(frozen=True)
class Store:
    """Results in a folder, one file per job.

    Attributes:
        folder: Made when a result is written.
        accepts_other_code: Whether a result of other code counts, the newest one, if there is none of this code.
    """

    folder: Path
    accepts_other_code: bool = False

    def find(self, job: Job) -> dict[str, Any] | None:
        """Return what `write` stored for a job; None if there is none, with a line that says why if there are others.

        Raises:
            ResultError: A file cannot be read.
        """
        code = code_of(job.model)
        path = self.folder / job.file_name(code)
        if path.is_file():
            return _read(path)
        others = sorted(self.folder.glob(f"{glob.escape(job.stem)}-*-*.json"))
        rows = sorted((_read(other) for other in others), key=lambda row: row["finished"])
        own = ("set", "task", "model", "seed", "part")  # a set's name may hold a hyphen too
        rows = [row for row in rows if all(row["settings"].get(key) == vars(job)[key] for key in own)]
        same = [row for row in rows if row["settings"] == job.described()]
        if same and self.accepts_other_code:
            return same[-1]
        if same:
            print(
                f"{job.name}: stored with other code, of commit {same[-1]['commit']} (--accept-other-commits takes it)"
            )
        elif rows:
            former, now = rows[-1]["settings"], job.described()
            changed = ", ".join(
                f"{key} {former.get(key)}, now {now[key]}" for key in now if former.get(key) != now[key]
            )
            print(f"{job.name}: stored with {changed}")
        return None

    def write(self, job: Job, result: Mapping[str, Any]) -> dict[str, Any]:
        """Store a result with the job's settings, and the commit and versions that made it; return it all."""
        code = code_of(job.model)
        row = {
            "settings": job.described(),
            "result": dict(result),
            "commit": commit(),
            "code": code,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / job.file_name(code), json.dumps(row, indent=1).encode())
        return row


def digest(content: bytes) -> str:
    """Return 8 hex digits."""
    return hashlib.sha256(content).hexdigest()[:8]


def is_ours(model: str) -> bool:
    """Return whether a model is our head, as it is (`ours`) or with a switch turned (`ours, no denoising`)."""
    return model.partition(",")[0] == "ours"


@cache
def code_of(model: str) -> str:
    """Return 8 hex digits of the files that decide a model's result: ours of the whole recipe, a peer's of few."""
    patterns = (*SHARED_CODE, *(OUR_CODE if is_ours(model) else PEER_CODE))
    files = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    return digest(b"".join(str(path.relative_to(ROOT)).encode() + path.read_bytes() for path in files))


@cache
def commit() -> str:
    """Return the commit of the checkout, with `+changes` if files of it differ; `unknown` without git."""
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changes else head


def _read(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_bytes())
        return {name: row[name] for name in ("settings", "result", "commit", "code", "versions", "finished")}
    except (ValueError, KeyError) as error:
        raise ResultError(f"{path} is not a result of this benchmark: delete it") from error
