#!/usr/bin/env bash
# Streaming writes to azure://CONTAINER/FOLDER and reads azure://ACCOUNT.../CONTAINER/FOLDER: no address does both.
#
# Versions: mosaicml-streaming 0.13.0 with azure-storage-blob 12.31.1.
# Valid use: `MDSWriter(out="azure://container/folder")`, then `StreamingDataset(remote="azure://container/folder")`.
# Seen: the uploader (`AzureUploader.upload_file`) takes the host of the address as the container. The downloader
#   (`AzureDownloader._download_file_impl`) takes the first part of the path, so it asks for the container `folder`, and
#   fails with ResourceNotFoundError. The downloader's form fails in the uploader, which looks for a container with the
#   name of the host. (`azure-dl://` takes the host in both.)
# Whom it hurts: who converts a data set straight to Azure: what was written cannot be read by the same address.
# Remedy: write to azure://CONTAINER/FOLDER with AZURE_ACCOUNT_NAME set, read azure://ACCOUNT.blob.core.windows.net/
#   CONTAINER/FOLDER.
# A stand-in for Azure's client notes which container is asked for; nothing is sent.
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet 'mosaicml-streaming==0.13.0' 'torch==2.7.0' \
    'azure-storage-blob==12.31.1' 'setuptools<81'
cd "$folder"
cat > seen.py <<'PY'
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

import azure.storage.blob
from streaming.base.storage import CloudDownloader, CloudUploader

os.environ.update(AZURE_ACCOUNT_NAME="account", AZURE_ACCOUNT_ACCESS_KEY="key")
ADDRESSES = ("azure://container/folder", "azure://account.blob.core.windows.net/container/folder")


def asked_for(address):
    """The containers that writing and reading one file ask for."""
    client = MagicMock()
    azure.storage.blob.BlobServiceClient = lambda **given: client
    outbox = Path("outbox")
    outbox.mkdir(exist_ok=True)
    uploader = CloudUploader.get(("outbox", address), exist_ok=True)
    (outbox / "file").write_text("x")
    uploader.upload_file("file")
    Path("read").unlink(missing_ok=True)
    CloudDownloader.direct_download(f"{address}/file", os.path.abspath("read"))
    return client.get_container_client.call_args.kwargs["container"], client.get_blob_client.call_args.kwargs["container"]


found = {address: asked_for(address) for address in ADDRESSES}
for address, (written, read) in found.items():
    print(f"{address}: written to the container {written}, read from the container {read}")
sys.exit(0 if all(written != read for written, read in found.values()) else 1)
PY
"$folder/venv/bin/python" seen.py
