"""A checkpoint from a store is read once per node: what was downloaded to be verified is what the Trainer loads."""

import atexit
from pathlib import Path

from composer.utils import dist

from recipe.checkpoints.check import check, read_manifest
from recipe.checkpoints.places import open_folder
from recipe.redact import redact
from recipe.upstream.agreement import agree, from_rank_0
from recipe.upstream.local_copies import LocalCopies

_downloads: dict[str, LocalCopies] = {}  # of this process, by address of the folder in the store


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


def on_this_node(path: str) -> str:
    """Return where the ranks of this node read a checkpoint that rank 0 has verified; called by all ranks.

    If it is in a store, the first rank of each further node fetches and verifies it too. A sharded one of several
    nodes stays an address: each rank reads its own part.

    Raises:
        OSError, ValueError, RuntimeError: A node cannot fetch it; on every rank.
    """
    if "://" not in path:
        return path
    local, is_sharded = from_rank_0(lambda: _fetched(path))
    if local is None or (is_sharded and dist.get_world_size() > dist.get_local_world_size()):
        return path
    error, name = None, path.removeprefix(f"{local}/")
    if dist.get_local_rank() == 0 and dist.get_global_rank() > 0:
        try:
            place = open_folder(local)
            manifest = read_manifest(place, name)
            assert manifest is not None
            if reason := check(place, name, manifest, scratch_folder(local)):
                raise ValueError(f"{redact(path)} is broken on this node: {reason}: run the same command again")
        except (OSError, ValueError) as raised:  # raised by all ranks
            error = raised
    agree(error)
    folders = dist.all_gather_object(str(_folder(_downloads[local])) if local in _downloads else "")
    return f"{folders[dist.get_global_rank() - dist.get_local_rank()]}/{name}"


def remove_download(path: str) -> None:
    """Remove a checkpoint that was fetched, after all ranks have loaded it from `path`."""
    for address, made in list(_downloads.items()):
        if Path(path).is_relative_to(made.path):
            _downloads.pop(address).remove()


def _folder(made: LocalCopies) -> Path:
    return made.path / "downloaded"


def _fetched(path: str) -> tuple[str | None, bool]:
    """Return the address of the folder that this process has fetched a checkpoint of, and whether it is sharded."""
    for address, made in _downloads.items():
        if path.startswith(f"{address}/") and (local := _folder(made) / path.removeprefix(f"{address}/")).exists():
            return address, local.is_dir()
    return None, False
