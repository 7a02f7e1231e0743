"""Run a script of FiftyOne with mongomock in the place of MongoDB, where there is no MongoDB: `python THIS SCRIPT`."""

import runpy
import sys
from typing import Any

import fiftyone  # pyright: ignore[reportMissingImports]
import mongoengine.connection  # pyright: ignore[reportMissingImports]
import mongomock.aggregate  # pyright: ignore[reportMissingImports]
import pymongo  # pyright: ignore[reportMissingImports]

Parser = mongomock.aggregate._Parser
known = Parser._handle_array_operator


def with_index(self: Any, operator: str, value: Any) -> Any:
    """Add to mongomock's operators the one that FiftyOne needs to select samples."""
    if operator != "$indexOfArray":
        return known(self, operator, value)
    array, item = (self.parse(part) for part in value)
    return array.index(item) if item in array else -1


class Client(mongomock.MongoClient):
    """One store in memory, which says that it is MongoDB 7."""

    _closed = False

    def server_info(self) -> dict[str, Any]:
        return {"version": "7.0.0", "versionArray": [7, 0, 0, 0]}


Parser._handle_array_operator = with_index
client = Client("mongodb://localhost")
pymongo.MongoClient = mongoengine.connection.MongoClient = lambda *args, **kwargs: client
fiftyone.config.database_uri = "mongodb://localhost"
fiftyone.config.database_validation = fiftyone.config.database_admin = False
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
