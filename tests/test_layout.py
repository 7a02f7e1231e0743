"""The layout that the README promises: imports flow one way, files stay small, nothing names one machine."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports from lower levels, its own package and, where allowed, modules beside it.
LEVELS: list[set[str]] = [
    {"schema", "boxes", "pictures", "redact", "config", "config_file", "logging_setup"}
    | {"sidecar", "shared_memory", "exit_codes", "environment", "picture_files", "prediction_files"}
    | {"draw"},
    {"data", "models", "losses", "metrics"},
    {"network", "inference", "joint", "build", "annotated", "calibrate"},
    {"optim", "schedule", "checkpoint", "checkpoints", "callbacks", "algorithms", "parallel", "loggers"},
    {"config_checks", "keyword_checks", "predict_options"},
    {"train", "eval", "predict", "export", "estimate", "gallery"},
]
READS_RAW_DATA = {"annotated.py"}  # of recipe/: pictures given to predict.py and gallery.py in a converter's form
NEVER_EACH_OTHER = [LEVELS[1], LEVELS[5]]
MOST_LINES_OF_A_CONVERTER = 450
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


def modules_of_recipe(path: Path) -> set[str]:
    """The parts of recipe that a file imports: `recipe.data.chat` counts as `data`."""
    parts = [name.split(".") for name in imported_names(path)]
    assert ["recipe"] not in parts, f"{path}: import recipe.NAME, not recipe"
    return {part[1] for part in parts if part[0] == "recipe"}


def level_of(module: str) -> int:
    for level, modules in enumerate(LEVELS):
        if module in modules:
            return level
    raise AssertionError(f"recipe/{module} has no place in the import order: add it to LEVELS in {Path(__file__).name}")


def own_module(path: Path) -> str:
    return path.relative_to(ROOT / "recipe").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources("recipe"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_flow_one_way(path: Path) -> None:
    module = own_module(path)
    if module == "__init__":
        return
    for imported in modules_of_recipe(path) - {module}:
        assert level_of(imported) <= level_of(module), f"{path.name} imports recipe.{imported} from above"
        for group in NEVER_EACH_OTHER:
            assert not {module, imported} <= group, f"{path.name}: recipe.{module} must not import recipe.{imported}"


def test_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in sources("recipe"):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[dotted] = {name for name in imported_names(path) if name.startswith("recipe.")}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"import cycle: {' -> '.join([*above, name])}"
        if name not in done:
            for imported in graph.get(name, ()):
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", sources("convert"), ids=lambda path: str(path.relative_to(ROOT)))
def test_converters_stand_alone(path: Path) -> None:
    assert modules_of_recipe(path) <= {"schema", "boxes", "pictures", "sidecar", "redact"}
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES_OF_A_CONVERTER, f"{path.name} has {lines} lines"


def test_recipe_does_not_import_convert_or_tests() -> None:
    for path in sources("recipe", "convert"):
        tops = {name.split(".")[0] for name in imported_names(path)}
        may_convert = path.is_relative_to(ROOT / "convert") or path.name in READS_RAW_DATA
        forbidden = {"tests"} if may_convert else {"tests", "convert"}
        assert not tops & forbidden, f"{path} imports {tops & forbidden}"


def test_imports_are_absolute() -> None:
    for path in sources("recipe", "convert", "tests"):
        relative = [name for name in imported_names(path) if name.startswith(".")]
        assert not relative, f"{path} imports {relative}"


def test_init_files_are_empty() -> None:
    for path in sources("recipe", "convert"):
        if path.name == "__init__.py":
            assert path.stat().st_size == 0, f"{path} must be empty"


def test_every_package_has_an_init_file() -> None:
    for path in sources("recipe", "convert"):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} lacks __init__.py: it would not be installed"


def test_no_module_shadows_another_package() -> None:
    """`composer recipe/train.py` puts recipe/ first on sys.path, so recipe/streaming.py would be `import streaming`."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) - {"recipe", "convert"}
    for folder in ("recipe", "convert"):
        names = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
        assert not names & taken, f"{folder}/ has modules named like installed ones: {names & taken}"


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
