"""Delete objects and read shards: what Composer 0.32's stores cannot do, or do unseen.

`composer/utils/object_store/`: no class can remove an object, so no checkpoint in a store is ever pruned. The clients
that they hold can. Delete once `ObjectStore` has a `delete_object`.

`composer/utils/checkpoint.py`: `DistCPObjectStoreReader` downloads the shards that the ranks of a node need, without a
look at their content. A file that was read before, to be verified, is read again. Delete once the reader takes files
that are there and checks others.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.utils import checkpoint

_download = checkpoint.download_object_or_file


def delete_object(store: Any, name: str) -> None:
    """Delete an object of a Composer store, if it is there; raise NotImplementedError for a store of another kind."""
    kind = type(store).__name__
    if kind == "GCSObjectStore" and not store.use_gcs_sdk:
        delete_object(store.s3_object_store, name)
    elif kind == "S3ObjectStore":
        store.client.delete_object(Bucket=store.bucket, Key=store.get_key(name))
    elif kind == "GCSObjectStore":
        store.bucket.delete_blobs([store.get_key(name)], on_error=lambda blob: None)  # called for one that is missing
    elif kind == "OCIObjectStore":
        store.client.delete_object(store.namespace, store.bucket, name)
    elif kind == "LibcloudObjectStore":
        provider, container = store._provider, store._container
        provider.delete_object(provider.get_object(container.name, name))
    else:
        raise NotImplementedError(f"a {kind} of Composer cannot delete")


def read_shards_through(
    take: Callable[[str, Path], bool] = lambda name, target: False,
    judge: Callable[[str, Path], None] = lambda name, target: None,
) -> None:
    """Let the reader of sharded checkpoints ask `take` before a download and `judge` after one.

    Both get an object's name and the file to be. `take` makes the file and returns True, or returns False.
    """

    def download(name: str, target: str | Path, store: Any) -> None:
        if not take(name, Path(target)):
            _download(name, target, store)
            judge(name, Path(target))

    checkpoint.download_object_or_file = download
