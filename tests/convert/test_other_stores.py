"""gs:// and azure:// against emulators: a conversion, its data read by Streaming, and, of gs://, checkpoints."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from convert import lease, store
from convert.items import Found
from convert.remote import read_bytes
from convert.shapes import Scene
from convert.write import convert_split
from recipe.checkpoints.check import newest_valid
from recipe.checkpoints.places import StoreFolder
from recipe.upstream.storage import CheckedDataset, open_streams
from tests.checkpoints.checkpoint_cases import train
from tests.support.emulators import AZURE_ACCOUNT, AZURE_KEY, azurite, find_azurite, gcs_emulator, has_gcs

pytestmark = pytest.mark.slow
SCENES = Found([Scene(1, number, 56) for number in range(6)])


@pytest.fixture
def gcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a bucket."""
    if not has_gcs():
        pytest.skip("no gcp-storage-emulator: pip install gcp-storage-emulator")
    with gcs_emulator(tmp_path) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        yield "gs://bucket"


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a container, as on Azure; a patch leads its clients to the emulator."""
    if find_azurite() is None:
        pytest.skip("no azurite-blob: npm install azurite, and name its program in AZURITE")
    from azure.storage.blob import BlobServiceClient

    with azurite(tmp_path) as account:
        BlobServiceClient(account, credential=AZURE_KEY).create_container("bucket")
        monkeypatch.setenv("AZURE_ACCOUNT_NAME", AZURE_ACCOUNT)
        monkeypatch.setenv("AZURE_ACCOUNT_ACCESS_KEY", AZURE_KEY)

        def connect(account_url: str, credential: str) -> BlobServiceClient:
            assert account_url == f"https://{AZURE_ACCOUNT}.blob.core.windows.net"
            return BlobServiceClient(account, credential=credential)

        monkeypatch.setattr("azure.storage.blob.BlobServiceClient", connect)
        yield f"azure://{AZURE_ACCOUNT}.blob.core.windows.net/bucket"


def convert_and_read(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE", 0.1)
    convert_split(SCENES, f"{address}/set", "train", part_records=2, num_workers=2)
    with pytest.raises(ValueError, match="holds a data set"):
        convert_split(SCENES, f"{address}/set", "train", part_records=2)
    convert_split(SCENES, str(tmp_path / "local"), "train", part_records=2)
    folder = tmp_path / "local" / "train"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert store.read(f"{address}/set/train", str(path.relative_to(folder))) == path.read_bytes()
    stream = {"remote": f"{address}/set", "local": str(tmp_path / "cache"), "split": "train"}
    rows = CheckedDataset(streams=open_streams({"rows": stream}), batch_size=1)
    local = CheckedDataset(
        streams=open_streams({"rows": {"local": str(tmp_path / "local"), "split": "train"}}), batch_size=1
    )
    assert [rows[number] for number in range(6)] == [local[number] for number in range(6)]
    assert read_bytes(f"{address}/set/train/index.json") == (folder / "index.json").read_bytes()
    with pytest.raises(ValueError, match="missing file"):
        read_bytes(f"{address}/set/none.jpg")


def test_google(gcs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_and_read(gcs, tmp_path, monkeypatch)


def test_azure(azure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_and_read(azure, tmp_path, monkeypatch)


def test_checkpoints_at_google(gcs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.checkpoints.upload.upload_process", lambda: ThreadPoolExecutor(1))
    train(f"{gcs}/run", 3, num_checkpoints_to_keep=2)
    names = {name for name in StoreFolder(f"{gcs}/run").names() if name.startswith("ba")}
    assert names == {f"ba{batch}.pt{kind}" for batch in (2, 3) for kind in ("", ".manifest.json")}
    found = newest_valid(f"{gcs}/run")
    assert found is not None and found.manifest.batch == 3
