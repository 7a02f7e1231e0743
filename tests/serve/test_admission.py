"""The limits of a request's body: number, size, time; each ends in a status."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from recipe.serve.admission import Admission, Measures
from recipe.serve.options import Limits

LIMITS = Limits(max_requests=2, max_bytes=10, receive_seconds=0.2)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    assert not message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def call(gate: Any, parts: Sequence[bytes], pause: float = 0.0, leaves: bool = False) -> Any:
    """A request of those parts; returns a coroutine of (status, body, headers), None if nothing was sent."""
    messages: Iterator[dict[str, Any]] = iter(
        [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        + [{"type": "http.disconnect"} if leaves else {"type": "http.request", "body": b"", "more_body": False}]
    )
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause)
        return next(messages)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def run() -> Any:
        await gate({"type": "http", "method": "POST", "path": "/"}, receive, send)
        if not sent:
            return None
        return sent[0]["status"], b"".join(part["body"] for part in sent[1:]), dict(sent[0]["headers"])

    return run()


def gate(app: Any = echo) -> Any:
    return Admission(app, LIMITS, Measures.new())


def test_a_body_comes_whole() -> None:
    assert asyncio.run(call(gate(), [b"abc", b"", b"defghij"])) == (200, b"abcdefghij", {})


def test_a_large_body_is_read_to_its_end_and_refused() -> None:
    status, body, _ = asyncio.run(call(gate(), [b"abcdef"] * 50))
    assert status == 413 and b"more than" in body


def test_a_slow_client_is_told_so() -> None:
    status, body, _ = asyncio.run(call(gate(), [b"a"] * 9, pause=0.05))
    assert status == 408 and b"within 0.2 s" in body


def test_who_leaves_gets_nothing_and_frees_the_place() -> None:
    own = gate()
    for _ in range(5):
        assert asyncio.run(call(own, [b"a"], leaves=True)) is None
    assert asyncio.run(call(own, [b"a"])) == (200, b"a", {})


def test_one_too_many_is_turned_away_and_others_are_not() -> None:
    async def main() -> list[Any]:
        free = asyncio.Event()

        async def waiting(scope: Any, receive: Any, send: Any) -> None:
            await free.wait()
            await echo(scope, receive, send)

        own = gate(waiting)
        first = [asyncio.create_task(call(own, [b"a"])) for _ in range(2)]
        await asyncio.sleep(0)
        third = await call(own, [b"b"])
        free.set()
        return [*await asyncio.gather(*first), third, await call(own, [b"c"])]

    *first, third, later = asyncio.run(main())
    assert [status for status, *_ in first] == [200, 200] and later[0] == 200
    assert third[0] == 429 and third[2][b"retry-after"] == b"1"


def test_every_status_is_counted() -> None:
    measures = Measures.new()
    own = Admission(echo, LIMITS, measures)
    for parts in ([b"a"], [b"b"], [b"x" * 11]):
        asyncio.run(call(own, parts))

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError):
        asyncio.run(call(Admission(failing, LIMITS, measures), [b"a"]))
    counted = {
        status: measures.registry.get_sample_value("recipe_requests_total", {"status": status})
        for status in ("200", "413", "500")
    }
    assert counted == {"200": 2, "413": 1, "500": 1}
    assert measures.registry.get_sample_value("recipe_open_requests") == 0
