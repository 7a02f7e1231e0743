"""Delete an object: Composer 0.32's stores write, read and list, but cannot remove.

`composer/utils/object_store/`: no class has a method for it, so no checkpoint in a store is ever pruned. The clients
that they hold can. Delete once `ObjectStore` has a `delete_object`.
"""

from typing import Any


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
