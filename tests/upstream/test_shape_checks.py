"""`recipe.upstream.shape_checks`: wrong shapes are named, in tests and by `debug.check_shapes`."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jaxtyping
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from recipe.config import ConfigError
from recipe.models.token_losses import token_losses
from recipe.upstream import shape_checks
from recipe.upstream.shape_checks import PACKAGES, check_shapes, only_shapes

ROOT = Path(__file__).parents[2]
# What another library calls with any mask, and what is called with any arguments.
WITHOUT_SHAPE = {
    "packed_sdpa",
    "packed_mask",
    "forward rotary_pos_emb",
    "varlen_kernel",
    "fits_varlen",
    "attend_varlen",
    "tensors",
}


def test_the_error_names_function_argument_and_both_shapes():
    """The matrix is one column too wide for the states."""
    with pytest.raises(TypeCheckError) as error:
        token_losses(torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64))
    message = str(error.value)
    assert "the parameters of recipe.models.token_losses.token_losses" in message
    assert "parameter 'weight'" in message
    assert "f32[5,4]" in message and "Float[Tensor, 'V D']" in message and "D=3" in message.replace("'", "")


def test_a_wrong_dtype_is_an_error_too():
    with pytest.raises(TypeCheckError, match="parameter 'labels'"):
        token_losses(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2))


def test_only_annotations_with_a_shape_are_checked():
    def bare(number: int) -> int:
        return number

    def mixed(number: int, boxes: tuple[Float[Tensor, "n 4"], ...] | None) -> str:
        return ""

    assert only_shapes(bare) is bare
    checked = only_shapes(mixed)
    checked("no number", (torch.zeros(3, 4),))  # pyright: ignore[reportArgumentType]
    checked(1, None)
    with pytest.raises(Exception, match="boxes"):
        checked(1, (torch.zeros(3, 5),))


def test_too_late_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shape_checks, "_hooked", [])
    with pytest.raises(RuntimeError, match=r"comes too late: recipe\.\w+"):
        check_shapes()


def test_without_beartype_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shape_checks, "_hooked", [])
    monkeypatch.setitem(sys.modules, "beartype", None)
    with pytest.raises(ConfigError, match=r"needs beartype: pip install -e '\.\[debug\]'"):
        check_shapes()


RUN = """
import sys
from dataclasses import replace
from recipe import train
from recipe.config import DebugConfig, RecipeConfig

def main(config):
    import torch
    from recipe.losses.terms import box_losses
    box_losses(torch.zeros(2, 4), torch.zeros(int(sys.argv[2]), 4))
    print("passed")

import recipe.upstream.shape_checks
train.main = main
config = RecipeConfig(debug=DebugConfig(check_shapes=sys.argv[1] == "true"))
import unittest.mock as mock
with mock.patch.dict(sys.modules, {"recipe.checks": mock.MagicMock()}):
    train.run(config)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "boxes", "expected"), [("true", "3", False), ("true", "2", True), ("false", "1", True)]
)
def test_a_run_checks_if_the_key_is_set(check: str, boxes: str, expected: bool):
    """In a process of its own, as the tests' own one checks anyway. Without checks a wrong shape is broadcast."""
    done = subprocess.run([sys.executable, "-c", RUN, check, boxes], capture_output=True, text=True, cwd=ROOT)
    assert ("passed" in done.stdout) == expected, done.stderr
    if not expected:
        assert "the parameters of recipe.losses.terms.box_losses" in done.stderr and "parameter 'true'" in done.stderr


def bare_arrays(annotation: ast.expr) -> Iterator[str]:
    """Names of array types outside a shape."""
    of = annotation.value if isinstance(annotation, ast.Subscript) else None
    if isinstance(of, ast.Name) and hasattr(jaxtyping, of.id):
        return
    if isinstance(annotation, ast.Name) and annotation.id in ("Tensor", "NDArray"):
        yield annotation.id
    for child in ast.iter_child_nodes(annotation):
        if isinstance(child, ast.expr):
            yield from bare_arrays(child)


def public_functions(body: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Of a module, and of its public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def test_public_functions_hold_their_shapes():
    found = set()
    for package in PACKAGES:
        for path in sorted(ROOT.joinpath(*package.split(".")).glob("*.py")):
            for node in public_functions(ast.parse(path.read_text()).body):
                arguments = [*node.args.args, *node.args.kwonlyargs, *filter(None, [node.args.vararg])]
                for name, hint in [(item.arg, item.annotation) for item in arguments] + [("return", node.returns)]:
                    is_free = {node.name, f"{node.name} {name}"} & WITHOUT_SHAPE
                    if hint is not None and not is_free and any(bare_arrays(hint)):
                        found.add(f"{path.name}: {node.name} {name}")
    assert not found
