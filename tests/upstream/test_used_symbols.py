"""`recipe/upstream/README.md` names every symbol of Composer and Streaming that is used, and where."""

import ast
import importlib
import re
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = ("composer", "streaming")


def shortest(module: str, name: str) -> str:
    """Return the name at the top of the library if that is the same object."""
    top, item = importlib.import_module(module.split(".")[0]), getattr(importlib.import_module(module), name)
    return f"{top.__name__ if getattr(top, name, None) is item else module}.{name}"


def used_symbols(source: str) -> set[str]:
    """Return the dotted names that a file imports, and for an imported module what it reads of it."""
    tree, found, modules = ast.parse(source), set[str](), dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            for item in node.names:
                if isinstance(getattr(importlib.import_module(node.module), item.name), ModuleType):
                    modules[item.asname or item.name] = f"{node.module}.{item.name}"
                else:
                    found.add(shortest(node.module, item.name))
        elif isinstance(node, ast.Import):
            names = [item for item in node.names if item.name.split(".")[0] in LIBRARIES]
            modules |= {item.asname or item.name: item.name for item in names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            found.add(f"{modules[ast.unparse(node.value)]}.{node.attr}")
    return found


def used_in_the_recipe() -> dict[str, set[str]]:
    """Return the folders that use each symbol."""
    places: defaultdict[str, set[str]] = defaultdict(set)
    for top in ("recipe", "convert"):
        for path in ROOT.joinpath(top).rglob("*.py"):
            for symbol in used_symbols(path.read_text(encoding="utf-8")):
                places[symbol].add(path.parent.relative_to(ROOT).as_posix())
    return dict(places)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from composer.core import State, Time as T", {"composer.State", "composer.Time"}),
        ("from composer.utils import dist\ndist.barrier()\ndist.barrier()", {"composer.utils.dist.barrier"}),
        ("import composer.utils.dist as d\nd.barrier()", {"composer.utils.dist.barrier"}),
        ("import streaming\nstreaming.Stream()", {"streaming.Stream"}),
        ("from torch import Tensor\nimport numpy", set()),
    ],
)
def test_symbols_by_hand(source: str, expected: set[str]):
    assert used_symbols(source) == expected


def test_the_table_is_complete():
    text = (ROOT / "recipe/upstream/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `((?:composer|streaming)[\w.]*)` \| ([^|]+) \|$", text, re.MULTILINE)
    stated = {symbol: set(re.findall(r"`([^`]+)`", places)) for symbol, places in rows}
    assert stated == used_in_the_recipe()
