"""Which files of a sharded checkpoint a node reads, and from where; with a store: `test_in_a_store.py`."""

from pathlib import Path
from typing import Any

import pytest
from composer.utils import checkpoint

from recipe.checkpoints import download
from recipe.checkpoints.check import Manifest, describe_file, manifest_of, write_manifest
from recipe.upstream import object_stores
from tests.checkpoints.checkpoint_cases import ORIGIN

ADDRESS = "s3://bucket/run/ba1"


def make_manifest(files: dict[str, Any], sharded: bool = True) -> Manifest:
    return Manifest(files, {"batch": 1, "epoch": 0}, ORIGIN, len(files), sharded, False, {})


@pytest.mark.parametrize(
    ("ranks_per_node", "rank", "expected"),
    [(8, 3, None), (2, 0, {0, 1}), (2, 1, {0, 1}), (2, 5, {4, 5}), (4, 7, {4, 5, 6, 7}), (1, 6, {6})],
)
def test_each_node_verifies_the_files_of_its_ranks(
    monkeypatch: pytest.MonkeyPatch, ranks_per_node: int, rank: int, expected: set[int] | None
) -> None:
    shards = [f"__{number}_0.distcp" for number in range(8)]
    manifest = make_manifest(dict.fromkeys([".metadata", *shards]))
    for name, value in (("global_rank", rank), ("local_world_size", ranks_per_node), ("world_size", 8)):
        monkeypatch.setattr(f"composer.utils.dist.get_{name}", lambda value=value: value)
    own = expected and {".metadata", *(shards[number] for number in expected)}
    assert download.own_files(ADDRESS, manifest) == own
    assert download.own_files(ADDRESS, make_manifest({"ba1.pt": None}, sharded=False)) is None
    assert download.own_files("/shared/run/ba1", manifest) is None, "rank 0 alone verifies what is on a disk"


def test_all_files_of_more_ranks_than_there_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six ranks saved; two nodes of one rank each verify three files each."""
    manifest = make_manifest({f"__{number}_0.distcp": None for number in range(6)})
    monkeypatch.setattr("composer.utils.dist.get_world_size", lambda: 2)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr("composer.utils.dist.get_global_rank", lambda rank=rank: rank)
        found.append(download.own_files(ADDRESS, manifest))
    assert found == [{f"__{number}_0.distcp" for number in numbers} for numbers in ((0, 2, 4), (1, 3, 5))]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of two shards, of which this node has the first."""
    folder = tmp_path / "copy" / "ba1"
    folder.mkdir(parents=True)
    for number in (0, 1):
        (folder / f"__{number}_0.distcp").write_bytes(b"shard %d" % number)
    manifest = make_manifest({path.name: describe_file(path) for path in folder.iterdir()})
    write_manifest(manifest, Path(manifest_of(str(folder), sharded=True)))
    (folder / "__1_0.distcp").unlink()
    monkeypatch.setattr(checkpoint, "download_object_or_file", None)  # put back at the end
    download._read_shards_from(folder, ADDRESS)
    return folder


def read(name: str, target: Path) -> bytes:
    """As Composer's reader does."""
    checkpoint.download_object_or_file(name, str(target), None)  # pyright: ignore[reportArgumentType]
    return target.read_bytes()


def test_a_copy_is_read_and_the_rest_verified(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {"run/ba1/__1_0.distcp": b"shard 1", "run/other": b"of no manifest"}
    monkeypatch.setattr(object_stores, "_download", lambda name, target, store: Path(target).write_bytes(stored[name]))
    assert read("run/ba1/__0_0.distcp", tmp_path / "0") == b"shard 0"
    assert read("run/ba1/__1_0.distcp", tmp_path / "1") == b"shard 1"
    assert read("run/other", tmp_path / "2") == b"of no manifest"
    stored["run/ba1/__1_0.distcp"] = b"shard 2"
    with pytest.raises(download.BrokenCheckpoint, match="ba1 is broken: 3 has another SHA-256"):
        read("run/ba1/__1_0.distcp", tmp_path / "3")


def test_a_copy_on_another_disk(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    assert read("run/ba1/__0_0.distcp", tmp_path / "0") == b"shard 0"
