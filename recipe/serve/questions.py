"""What a client may ask, and how its request says it: a form, JSON or a plain image."""

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from recipe.inference.predictor import Request
from recipe.serve.admission import Refusal

_Text = Annotated[str, Field(min_length=1, max_length=4096)]
_Name = Annotated[str, Field(min_length=1, max_length=256)]
_LISTS = ("classes", "expressions")
MOST_CLASSES = 1024


class Question(BaseModel):
    """What to ask about an image; what is left out is as the model was trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    answer: Literal["text", "boxes", "both"] | None = Field(None, description="the language model's, the head's, both")
    prompt: _Text | None = Field(None, description="asked in place of the run's prompt")
    expressions: tuple[_Text, ...] | None = Field(None, max_length=64, description="look for these")
    classes: tuple[_Name, ...] | None = Field(None, max_length=MOST_CLASSES, description="in place of captions")
    threshold: float | None = Field(None, ge=0, le=1, description="least score of an object")
    nms_iou: float | None = Field(None, gt=0, lt=1, description="of two boxes that overlap more, the worse is left out")

    def request(self) -> Request:
        """Return it as the detector takes it."""
        return Request(self.answer, self.prompt, self.expressions, self.classes, self.threshold, self.nms_iou)


class ImageQuestion(Question):
    """A question with its image, as JSON: exactly one of `image` and `url`."""

    image: str | None = Field(None, description="the file in base64")
    url: str | None = Field(None, max_length=4096, description="https; only from hosts that the server allows")


class FoundObject(BaseModel):
    """An object: box xyxy in pixels of the displayed image."""

    box: tuple[float, float, float, float]
    score: float | None = Field(None, description="calibrated, if the model is; objects of a text answer have none")
    caption: str
    classes: list[tuple[str, float]] | None = Field(None, description="probability of each likely class")


class Answer(BaseModel):
    """What was found in an image of that many pixels."""

    width: int
    height: int
    objects: list[FoundObject] | None = Field(description="of the head, by falling score; null if it was not asked")
    answer: str | None = Field(description="of the language model; null if it was not asked")
    answer_objects: list[FoundObject] | None = Field(description="that the answer names; null if it names none")
    answer_is_cut: bool


class Sent(BaseModel):
    """What a request holds: a question, and an image or where it is."""

    question: Question
    data: bytes | None
    url: str | None


async def read_request(request: HttpRequest) -> Sent:
    """Return the question and the image of a request.

    Raises:
        Refusal: It is none.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        sent = _checked(ImageQuestion, await request.body())
        if (sent.image is None) == (sent.url is None):
            raise Refusal(422, "give one of image (base64) and url")
        question = Question(**{name: getattr(sent, name) for name in Question.model_fields})
        return Sent(question=question, data=None if sent.image is None else _decoded(sent.image), url=sent.url)
    if kind == "multipart/form-data":
        return await _read_form(request)
    if kind.startswith("image/") or kind == "application/octet-stream":
        question = _checked(Question, _fields(request.query_params.multi_items()))
        return Sent(question=question, data=await request.body(), url=None)
    raise Refusal(415, f"content-type {kind!r}: send an image/..., multipart/form-data or application/json")


async def _read_form(request: HttpRequest) -> Sent:
    try:
        async with request.form(max_files=1, max_fields=MOST_CLASSES + 64) as form:
            items = form.multi_items()
            files = [value for name, value in items if name == "image" and isinstance(value, UploadFile)]
            if len(files) != 1:
                raise Refusal(422, "the form has no file named image")
            data = await files[0].read()
    except HTTPException as error:  # of the parser
        raise Refusal(400, f"the form cannot be read: {error.detail}") from error
    question = _checked(Question, _fields([(name, value) for name, value in items if name != "image"]))
    return Sent(question=question, data=data, url=None)


def _fields(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return fields of a form or a query, those of lists as lists."""
    found: dict[str, Any] = {}
    for name, value in items:
        if name in _LISTS:
            found.setdefault(name, []).append(value)
        elif name in found:
            raise Refusal(422, f"{name} is given twice")
        else:
            found[name] = value
    return found


def _checked(model: type[Any], content: bytes | dict[str, Any]) -> Any:
    """Return content as a model; raise Refusal that names each wrong field."""
    try:
        return model.model_validate_json(content) if isinstance(content, bytes) else model.model_validate(content)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, row['loc'])) or 'JSON'}: {row['msg']}" for row in error.errors())
        raise Refusal(422, "; ".join(problems)[:1000]) from error


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(422, "image is not base64: send the file's bytes in it, without a data: prefix") from error
