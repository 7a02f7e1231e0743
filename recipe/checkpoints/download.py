"""A checkpoint from a store is read once per node: what was downloaded to be verified is what the Trainer loads.

Of a sharded one over several nodes no node reads all: each verifies what its own ranks wrote, and Composer's reader
gets those files from that copy. What a rank needs beyond, such as what all ranks share, is verified as it comes.
"""

import atexit
import os
import re
import shutil
from collections.abc import Container
from pathlib import Path, PurePosixPath

from composer.utils import dist, parse_uri

from recipe.checkpoints.check import Manifest, check, describe_file, read_manifest
from recipe.checkpoints.places import open_folder
from recipe.redact import redact
from recipe.upstream.agreement import agree, from_rank_0
from recipe.upstream.local_copies import LocalCopies
from recipe.upstream.object_stores import read_shards_through

_SHARD = re.compile(r"__(\d+)_\d+\.distcp")

_downloads: dict[str, LocalCopies] = {}  # of this process, by address of the folder in the store


class BrokenCheckpoint(ValueError):
    """A file of a checkpoint in a store is not as its manifest says."""

    def __init__(self, address: str, reason: str):
        super().__init__(f"{redact(address)} is broken: {reason}: give another checkpoint")
        self.address, self.reason = address, reason


def scratch_folder(address: str | None) -> Path | None:
    """Return an empty folder for a checkpoint below `address`, removed at the end; None if it is not in a store."""
    if address is None or "://" not in address:
        return None
    address = address.rstrip("/")
    if address in _downloads:
        _downloads.pop(address).remove()
    made = _downloads[address] = LocalCopies()
    atexit.register(made.remove)
    folder = _folder(made)
    folder.mkdir()
    return folder


def own_files(address: str | None, manifest: Manifest) -> Container[str] | None:
    """Return the files of a checkpoint, at or below an address, that this node reads to verify it; None: all."""
    if not ("://" in (address or "") and manifest.sharded and _num_nodes() > 1):
        return None
    node, ranks = dist.get_global_rank() // dist.get_local_world_size(), dist.get_local_world_size()
    shards = {name: match for name in manifest.files if (match := _SHARD.fullmatch(name))}
    own = {name for name, match in shards.items() if int(match[1]) // ranks % _num_nodes() == node}
    return own | (manifest.files.keys() - shards.keys())


def on_this_node(path: str) -> str:
    """Return where the ranks of this node read a checkpoint, which rank 0 has verified for its own; called by all.

    If it is in a store, the first rank of each further node fetches and verifies it too. A sharded one of several
    nodes stays an address, of which Composer reads each file once.

    Raises:
        BrokenCheckpoint: A node finds a broken shard; on every rank.
        OSError, ValueError, RuntimeError: A node cannot fetch it; on every rank.
    """
    if "://" not in path:
        return path
    local = from_rank_0(lambda: _fetched(path))
    if local is None:
        return path
    name = path.removeprefix(f"{local}/")
    place = open_folder(local)
    error, reason = None, None
    if dist.get_local_rank() == 0 and dist.get_global_rank() > 0:
        try:
            manifest = read_manifest(place, name)
            assert manifest is not None
            reason = check(place, name, manifest, scratch_folder(local), own_files(local, manifest))
            if reason and not manifest.sharded:  # rank 0 found it whole
                raise ValueError(f"{redact(path)} is broken on this node: {reason}: run the same command again")
        except (OSError, ValueError) as raised:  # raised by all ranks
            error = raised
    agree(error)
    if reason := next(filter(None, dist.all_gather_object(reason)), None):
        raise BrokenCheckpoint(path, reason)
    folders = dist.all_gather_object(str(_folder(_downloads[local])) if local in _downloads else "")
    copy = Path(folders[dist.get_global_rank() - dist.get_local_rank()], name)
    if copy.is_dir() and _num_nodes() > 1:
        _read_shards_from(copy, path)
        return path
    return str(copy)


def remove_download(path: str) -> None:
    """Remove a checkpoint that was fetched, after all ranks have loaded it from `path`."""
    read_shards_through()
    for address, made in list(_downloads.items()):
        if path.startswith(f"{address}/") or Path(path).is_relative_to(made.path):
            _downloads.pop(address).remove()


def _num_nodes() -> int:
    return dist.get_world_size() // dist.get_local_world_size()


def _folder(made: LocalCopies) -> Path:
    return made.path / "downloaded"


def _fetched(path: str) -> str | None:
    """Return the address of the folder that this process has fetched a checkpoint of."""
    for address, made in _downloads.items():
        if path.startswith(f"{address}/") and (_folder(made) / path.removeprefix(f"{address}/")).exists():
            return address
    return None


def _read_shards_from(copy: Path, address: str) -> None:
    """Let Composer's reader take the files of a checkpoint from this node's copy, and verify those that it lacks."""
    manifest = read_manifest(open_folder(str(copy.parent)), copy.name)
    assert manifest is not None
    folder = PurePosixPath(parse_uri(address)[2])
    files = {str(folder / name): (copy / name, entry) for name, entry in manifest.files.items()}

    def take(name: str, target: Path) -> bool:
        if name not in files or not files[name][0].exists():
            return False
        try:
            os.link(files[name][0], target)
        except OSError:  # another disk
            shutil.copyfile(files[name][0], target)
        return True

    def judge(name: str, target: Path) -> None:
        if name in files and describe_file(target) != files[name][1]:
            raise BrokenCheckpoint(address, f"{target.name} has another SHA-256 than when it was written")

    read_shards_through(take, judge)
