"""The recipe: train, evaluate, predict and export. Begin with train.py, then schema.py, then README.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipe.inference.detector import Detector

__all__ = ["Detector"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: it takes seconds, and converters do without torch.
    if name == "Detector":
        from recipe.inference.detector import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
