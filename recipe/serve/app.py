"""The web application: a detector, and what is asked of it over HTTP.

POST /predict takes an image as a form's file, as base64 in JSON or as the body itself, and gives an `Answer`. GET / is
a page to try it, /health says that the server is there, /metrics is for Prometheus, /docs shows the interface.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from recipe.images import displayed_size
from recipe.inference.detector import Detector
from recipe.inference.predictor import Predictor
from recipe.schema import Example, Prediction
from recipe.serve.admission import Admission, Measures, Refusal
from recipe.serve.batching import Batcher
from recipe.serve.fetch import fetch
from recipe.serve.options import Limits
from recipe.serve.questions import Answer, ImageQuestion, Question, read_request

KEPT_QUESTIONS = 16  # of which equal ones share a batch
IMAGE_ID = "image"
PAGE = Path(__file__).with_name("page.html")
_BODY = {
    "application/json": {"schema": ImageQuestion.model_json_schema()},
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["image"],
            "properties": {
                "image": {"type": "string", "format": "binary"},
                **Question.model_json_schema()["properties"],
            },
        }
    },
    "image/*": {"schema": {"type": "string", "format": "binary"}},
}
_REFUSED = {
    400: "not an image, or one that cannot be read",
    408: "not sent in time",
    413: "too large",
    415: "an unknown content-type",
    422: "a wrong field",
    429: "too many requests at once; Retry-After says when to come again",
    503: "not answered in time",
}


def make_app(detector: Detector, limits: Limits, allowed_hosts: Collection[str] = ()) -> FastAPI:
    """Return the application; images behind URLs are fetched from the allowed hosts alone."""
    measures = Measures.new()
    batch_size, max_tokens = detector.predictor.batch_size, limits.max_batch_tokens
    batcher = Batcher(detector.predict, batch_size, max_tokens, measures.batch_images.observe)
    readers = ThreadPoolExecutor(os.cpu_count(), "images")
    asked = lru_cache(KEPT_QUESTIONS)(detector.asked)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        work = asyncio.create_task(batcher.run())
        yield
        work.cancel()
        readers.shutdown(wait=False)

    app = FastAPI(title="Detector", lifespan=lifespan, redoc_url=None, description=__doc__ or "")
    app.add_middleware(Admission, limits=limits, measures=measures)

    def read(question: Question, data: bytes) -> tuple[Example, Predictor]:
        try:
            predictor = asked(question.request())
        except ValueError as error:
            raise Refusal(422, str(error)) from error
        try:
            width, height = displayed_size(data)
            if width * height > limits.max_pixels:
                raise Refusal(
                    413, f"the image has {width} x {height} pixels, above {limits.max_pixels}: make it smaller"
                )
            return detector.encode(data, IMAGE_ID, predictor), predictor
        except ValueError as error:
            raise Refusal(400, str(error).removeprefix(f"sample {IMAGE_ID!r}: ")) from error

    async def answer(question: Question, data: bytes | None, url: str | None) -> Prediction:
        if data is None:
            assert url is not None  # in another thread than those that decode: a slow host keeps nobody else waiting
            data = await asyncio.to_thread(fetch, url, allowed_hosts, limits.max_bytes, limits.receive_seconds)
        work = partial(read, question, data)
        example, predictor = await asyncio.get_running_loop().run_in_executor(readers, work)
        found = await batcher.answer(example, predictor)
        if isinstance(found, str):
            raise Refusal(400, found)
        return found

    @app.post(
        "/predict",
        response_model=Answer,
        responses={status: {"description": what} for status, what in _REFUSED.items()},
        openapi_extra={"requestBody": {"required": True, "content": _BODY}},
    )
    async def predict(request: Request) -> Response:
        """Find and describe the objects of an image."""
        try:
            sent = await read_request(request)
            found = await _unless_gone(request, answer(sent.question, sent.data, sent.url), limits.answer_seconds)
        except Refusal as refusal:
            return refusal.response()
        if found is None:
            return Response(status_code=499)  # nobody reads it
        row = found.to_json()
        del row["id"]
        return JSONResponse(row)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server is there."""
        return {"status": "ok"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    return app


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Prediction], seconds: float) -> Prediction | None:
    """Return the result of `work`; None, and end it, if the client leaves before.

    Raises:
        Refusal: It took too long, or as `work`.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        done, _ = await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if not done:
            raise Refusal(503, f"no answer within {seconds:g} s: the server has too much to do")
        return None
    finally:
        task.cancel()
        gone.cancel()
