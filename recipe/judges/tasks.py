"""The tasks of lmms-eval: what they ask for in words, and in which form they read boxes.

Known by their prompts, so that a task of one's own that asks in the same words is answered too. Everything that this
file says about scoring holds for lmms-eval 0.7.3 and is tested with it (`tests/judges/test_lmms_eval.py`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipe.schema import DetectedObject

DIGITS = {"pixels": 2, "fractions": 8}  # after the decimal point


@dataclass(frozen=True)
class BoxQuestion:
    """A prompt that asks for boxes.

    Attributes:
        phrases: The classes to find, or all expressions for the one object to find.
        of_classes: Whether they are classes.
        unit: A key of `DIGITS`, in which the task reads boxes.
    """

    phrases: tuple[str, ...]
    of_classes: bool
    unit: str


def box_question(prompt: str) -> BoxQuestion | None:
    """Return what a prompt asks for; None if it does not ask for boxes in the words of a known task.

    ODinW reads a box as pixels, fractions and thousandths and keeps what overlaps the truth most. As fractions it is
    never mistaken: read as anything else, it is smaller than a pixel. `refcoco_grounding` keeps the better of pixels
    and thousandths; its prompt means pixels.
    """
    if found := re.search(r"belongs to the following categories: ´(.+)´\. Report bbox", prompt, re.DOTALL):
        return BoxQuestion(tuple(found[1].split(", ")), True, "fractions")
    if found := re.search(r'Locate every object that matches the description "(.+)" in the image\.', prompt, re.DOTALL):
        return BoxQuestion(tuple(found[1].split('", "')), False, "pixels")
    if found := re.search(r"between 0 and 1\. .* the region this sentence describes: (.+)", prompt, re.DOTALL):
        return BoxQuestion((found[1].strip(),), False, "fractions")
    return None


def boxes_text(objects: Sequence[DetectedObject], size: tuple[int, int], unit: str) -> str:
    """Return the answer: a JSON list of `{"bbox_2d", "label", "score"}` by rising score.

    ODinW's scoring drops the scores, reads the list from its end and ranks the boxes in that order.

    Args:
        objects: Boxes xyxy in pixels.
        size: (width, height) of the image, pixels.
        unit: A key of `DIGITS`.
    """
    scales = size * 2 if unit == "fractions" else (1, 1, 1, 1)
    rows: list[str] = []
    for item in sorted(objects, key=lambda item: item.score):
        # Formatted by hand: `refcoco_bbox_rec` finds a box by its digits, and JSON writes small numbers as 1e-05.
        box = ", ".join(f"{value / scale:.{DIGITS[unit]}f}" for value, scale in zip(item.box, scales, strict=True))
        label = json.dumps(item.caption, ensure_ascii=False)
        rows.append(f'{{"bbox_2d": [{box}], "label": {label}, "score": {item.score:.6g}}}')
    return f"[{', '.join(rows)}]"


def cut_at(text: str, ends: Sequence[str]) -> str:
    """Return a text up to the first of `ends`."""
    return text[: min((place for end in ends if end and (place := text.find(end)) >= 0), default=len(text))]


def manifest() -> Any:
    """Return what lmms-eval's entry point `lmms_eval.models` wants to know: name and class of the model."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest("recipe_detector", simple_class_path="recipe.judges.lmms_eval.RecipeDetector")
