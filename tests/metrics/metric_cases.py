"""Short builders of samples and predictions, shared by the metric tests."""

from collections.abc import Sequence

from recipe.schema import Box, DetectedObject, Object, Prediction, Sample

Truth = tuple[Box, str]
Found = tuple[Box, float, str]


def make_sample(
    name: str,
    truths: list[Truth] | None,
    crowds: list[Box] | None = None,
    expression: str | None = None,
    answers: Sequence[str] = (),
) -> Sample:
    """`expression` None: the detection chat; else what each user turn says, each of `answers` after one."""
    objects = None
    if truths is not None:
        objects = (*(Object(*truth) for truth in truths), *(Object(box, "", iscrowd=True) for box in crowds or []))
    if expression is None:
        return Sample(name, b"", 100, 100, objects)
    question = {"role": "user", "content": expression}
    turns = [turn for answer in answers for turn in (question, {"role": "assistant", "content": answer})]
    return Sample(name, b"", 100, 100, objects, tuple(turns or [question]))


def make_prediction(name: str, found: list[Found], answer_boxes: list[Box] | None = None) -> Prediction:
    """`answer_boxes` None: no answer was generated."""
    objects = tuple(DetectedObject(*item) for item in found)
    if answer_boxes is None:
        return Prediction(name, 100, 100, objects)
    return Prediction(name, 100, 100, objects, "[...]", tuple(DetectedObject(box, 1.0, "") for box in answer_boxes))
