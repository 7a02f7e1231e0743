"""The layout that recipe/README.md promises: imports go one way, files stay small, nothing names one machine."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A line may import those before it. Modules of one line may import each other, if they form no cycle.
ORDER = [
    "schema config boxes images redact",
    "records upstream console families configure rules",
    "data models losses metrics",
    "convert optim",
    "prediction algorithms",
    "joint gallery",
    "callbacks checkpoints",
    "load build",
    "inference publish",
    "checks estimate tiny",
    "train eval predict export look serve simulate",
    "judges",
]
LEVEL = {name: level for level, line in enumerate(ORDER) for name in line.split()}
STEPS = {"data", "models", "losses", "metrics"}  # none imports another
CONVERT_MAY_IMPORT = {"schema", "boxes", "images", "records", "redact"}
LAZY_INIT = ROOT / "recipe" / "__init__.py"
DOOR_TO_CONVERT = "convert.annotated"
MOST_MODULES = 21  # directly in recipe/
MOST_LINES = 450
MOST_ENTRIES = 600  # lines of schema.py and config.py, each one file so that every noun and every key is found in it
# Split, so that this file does not hold what it looks for.
MACHINE_PATHS = ["/" + folder + "/" for folder in ("work", "root", "home", "tmp")]
REGISTRY_HOSTS = ["pypi" + ".org", "python" + "hosted.org", "npmjs" + ".org", "download.pytorch" + ".org"]


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_names(path: Path) -> Iterator[str]:
    """Every imported module, `from a.b import c` as `a.b`; a relative import keeps its dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def room_of(name: str) -> str:
    """`recipe.data.chat` → `data`, `convert.coco` → `convert`."""
    parts = name.split(".")
    return "convert" if parts[0] == "convert" else parts[1]


def own_rooms_imported(path: Path) -> set[str]:
    names = [name for name in imported_names(path) if name.split(".")[0] in ("recipe", "convert")]
    assert "recipe" not in names, f"{path}: import recipe.NAME, not recipe"
    return {room_of(name) for name in names}


@pytest.mark.parametrize(
    "path",
    [path for path in sources("recipe", "convert") if path.name != "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert room in LEVEL, f"recipe/{room} has no place in the import order: add it to ORDER in {Path(__file__).name}"
    for imported in own_rooms_imported(path) - {room}:
        assert LEVEL[imported] <= LEVEL[room], f"{path} imports {imported}, which comes later"
        assert not {room, imported} <= STEPS, f"{path}: {room} must not import {imported}"
        if room == "convert":
            assert imported in CONVERT_MAY_IMPORT, f"{path} imports recipe.{imported}"


def test_recipe_imports_convert_through_one_module() -> None:
    for path in sources("recipe"):
        doors = {name for name in imported_names(path) if name.split(".")[0] == "convert"}
        assert doors <= {DOOR_TO_CONVERT}, f"{path} imports {doors}"


def test_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in sources("recipe", "convert"):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[dotted] = {name for name in imported_names(path) if name.startswith(("recipe.", "convert."))}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"import cycle: {' -> '.join([*above, name])}"
        if name not in done:
            for imported in graph.get(name, ()):
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_product_does_not_import_tests() -> None:
    for path in sources("recipe", "convert"):
        assert "tests" not in {name.split(".")[0] for name in imported_names(path)}, path


def test_recipe_has_few_modules_at_its_door() -> None:
    names = [path.name for path in (ROOT / "recipe").glob("*.py") if path.name != "__init__.py"]
    assert len(names) <= MOST_MODULES, names


def test_imports_are_absolute() -> None:
    for path in sources("recipe", "convert", "tests"):
        relative = [name for name in imported_names(path) if name.startswith(".")]
        assert not relative, f"{path} imports {relative}"


def test_init_files_hold_a_docstring_and_nothing_else() -> None:
    for path in sources("recipe", "convert"):
        if path.name == "__init__.py" and path != LAZY_INIT:
            body = ast.parse(path.read_text()).body
            assert len(body) == 1 and ast.get_docstring(ast.parse(path.read_text())), f"{path}: one docstring"


def test_the_one_exception_gives_names_lazily() -> None:
    """Whatever `import recipe.NAME` imports besides `recipe.NAME`, all converters would too."""
    known = {ast.Expr, ast.ImportFrom, ast.If, ast.Assign, ast.FunctionDef}
    body = ast.parse(LAZY_INIT.read_text()).body
    assert {type(node) for node in body} <= known
    assert [node.module for node in body if isinstance(node, ast.ImportFrom)] == ["typing"]
    assert [node.name for node in body if isinstance(node, ast.FunctionDef)] == ["__getattr__"]


def test_every_package_has_an_init_file() -> None:
    for path in sources("recipe", "convert"):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} lacks __init__.py: it would not be installed"


def private_names(path: Path) -> set[str]:
    """Private names that a file imports from other libraries, or reads from objects other than `self`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ("recipe", "convert"):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            names.add(node.attr)
    own = {
        name for node in ast.walk(tree) for name in (getattr(node, "name", None), getattr(node, "attr", None)) if name
    }
    own -= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not is_self(node.value)}
    return {name for name in names - own if name.startswith("_") and not name.startswith("__")} - {"_exit", "_replace"}


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_private_names_of_other_libraries_are_used_upstream_only() -> None:
    """Each file of recipe/upstream/ says why one is needed, and until when."""
    for path in sources("recipe", "convert"):
        if not path.is_relative_to(ROOT / "recipe" / "upstream"):
            assert not private_names(path), f"{path} uses {private_names(path)}: move it to recipe/upstream/"


def test_no_module_shadows_another_package() -> None:
    """`composer recipe/train.py` puts recipe/ first on sys.path, so recipe/streaming.py would be `import streaming`."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) - {"recipe", "convert"}
    taken = {name for name in taken if find_spec(name) is not None}  # azure-identity 1.25 lists folders it lacks
    for folder in ("recipe", "convert"):
        names = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
        assert not names & taken, f"{folder}/ has modules named like installed ones: {names & taken}"


def test_files_are_one_screenful_of_ideas() -> None:
    for path in sources("recipe", "convert"):
        lines = path.read_text(encoding="utf-8").count("\n")
        most = MOST_ENTRIES if path.name in ("schema.py", "config.py") else MOST_LINES
        assert lines <= most, f"{path} has {lines} lines: split it"


def test_test_files_have_names_of_their_own() -> None:
    """Without __init__.py files, pytest takes two tests of one name for one module."""
    names = [path.name for path in sources("tests") if path.name != "conftest.py"]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"rename one of each: {twice}"


def test_nothing_names_this_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found = [word for word in [*MACHINE_PATHS, *REGISTRY_HOSTS] if word in text]
        assert not found, f"{name} holds {found}"
