"""Bodies of requests within limits of number, size and time: read whole before anything else sees them."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recipe.serve.options import MIB, Limits

RETRY_SECONDS = 1  # after which a client that was turned away comes again
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)


@dataclass(frozen=True)
class Measures:
    """What /metrics shows."""

    registry: CollectorRegistry
    requests: Counter  # by status
    seconds: Histogram  # of a request that was let in, until its answer begins
    open_requests: Gauge
    batch_images: Histogram

    @classmethod
    def new(cls) -> "Measures":
        """Return measures that start at 0."""
        registry = CollectorRegistry()
        sizes = (1, 2, 4, 8, 16, 32, 64)
        return cls(
            registry,
            Counter("recipe_requests", "Requests that were answered", ["status"], registry=registry),
            Histogram("recipe_request_seconds", "From the start of a request", buckets=_SECONDS, registry=registry),
            Gauge("recipe_open_requests", "Requests that were let in and not answered yet", registry=registry),
            Histogram("recipe_batch_images", "Images that were answered at once", buckets=sizes, registry=registry),
        )


class Refusal(Exception):
    """Why a request is not answered.

    Attributes:
        status: Of HTTP.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status

    def response(self) -> JSONResponse:
        """Return it as an answer."""
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else None
        return JSONResponse({"detail": str(self)}, self.status, headers)


class Admission:
    """Lets POST requests in, with their whole bodies, or refuses them.

    The body of a refused request is read too, and thrown away: a client that is still sending would not see the answer.
    """

    def __init__(self, app: ASGIApp, limits: Limits, measures: Measures):
        self._app, self._limits, self._measures = app, limits, measures
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        began = asyncio.get_running_loop().time()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._measures.requests.labels(message["status"]).inc()
                self._measures.seconds.observe(asyncio.get_running_loop().time() - began)
            await send(message)

        is_full = self._open >= self._limits.max_requests
        if not is_full:
            self._open += 1
            self._measures.open_requests.inc()
        try:
            body = await self._read(receive, is_full)
            if body is None:  # the client has left
                return
            await self._app(scope, _again(body, receive), counted)
        except Refusal as refusal:
            await refusal.response()(scope, receive, counted)
        except Exception:  # answered with 500 further out
            self._measures.requests.labels(500).inc()
            raise
        finally:
            if not is_full:
                self._open -= 1
                self._measures.open_requests.dec()

    async def _read(self, receive: Receive, is_full: bool) -> bytes | None:
        """Return a whole body, None if its client leaves; raise Refusal if it is too large, late or one too many."""
        parts, size, most, seconds = list[bytes](), 0, self._limits.max_bytes, self._limits.receive_seconds
        message: Message = {"more_body": True}
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    if size > most or is_full:
                        parts.clear()
                    else:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body"):
                        break
        if size > most:
            raise Refusal(413, f"the request has more than {most / MIB:g} MiB: send a smaller image")
        if message.get("more_body"):
            raise Refusal(408, f"the request was not sent within {seconds:g} s")
        if is_full:
            raise Refusal(429, f"{self._limits.max_requests} requests are being answered: come again later")
        return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, then what follows."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
