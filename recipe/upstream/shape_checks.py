"""Check the shapes in annotations at run time, by jaxtyping's import hook and beartype.

jaxtyping 0.3 lets beartype check every annotation of a hooked module. Those without a shape are pyright's, which also
knows what a test puts in place of an object; here they are left out. Delete `only_shapes` once jaxtyping can do so.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar, get_args

from jaxtyping import AbstractArray, install_import_hook

from recipe.config import ConfigError

Checked = TypeVar("Checked", bound=Callable[..., Any])

PACKAGES = ("recipe.data", "recipe.models", "recipe.losses")
_hooked: list[str] = []


def check_shapes() -> None:
    """Let all functions of `PACKAGES` check the shapes of their arguments and results; call it before their import.

    A wrong one raises `jaxtyping.TypeCheckError`, which names function, argument, what was expected and what was found.
    Processes of a loader check too if they are forked, as on Linux.

    Raises:
        ConfigError: beartype is not installed.
        RuntimeError: One of the packages is already imported.
    """
    if _hooked:
        return
    try:
        import beartype  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "debug.check_shapes needs beartype: pip install -e '.[debug]', or set debug.check_shapes=false"
        ) from error
    loaded = [name for name in sys.modules if name.startswith(PACKAGES)]
    if loaded:
        raise RuntimeError(f"check_shapes comes too late: {loaded[0]} is imported; call it first")
    _hooked.extend(PACKAGES)
    install_import_hook(PACKAGES, f"{__name__}.only_shapes")


def only_shapes(function: Checked) -> Checked:
    """Return a function that checks those of its annotations that hold a shape; the same if none does."""
    from beartype import beartype

    annotations = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    if not annotations:
        return function
    function.__annotations__ = annotations
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_has_shape, get_args(hint)))
