"""One conversion at a time into an address of a store, from whatever machine.

A store has no locks. So a process writes an object next to the data set every `BEAT` seconds, with a number that grows:
another conversion that finds it watches whether it changes. Who begins looks again after `SETTLE` seconds: of two that
begin at once, the one that wrote last continues. The object stays, as a note of the last conversion's end: Streaming
cannot delete.
"""

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlparse

from convert import store
from recipe.redact import redact

SUFFIX = ".converting.json"
BEAT, WATCH, SETTLE = 5.0, 20.0, 1.0  # seconds


class Lease:
    """Holds an address from `hold` to the end of its block."""

    def __init__(self, address: str, process: Any = None):
        self.address = address
        self.process = process

    def check(self) -> None:
        """Raise ValueError if another conversion has taken the address meanwhile, as after a long sleep of this one."""
        if self.process is not None and not self.process.is_alive() and self.process.exitcode:
            raise ValueError(f"{_refusal(self.address, _read(self.address))}. This one has stopped")


@contextmanager
def hold(address: str) -> Iterator[Lease]:
    """Hold an address of a store; of a folder do nothing, since its staging folder is locked.

    Raises:
        ValueError: A conversion that is alive has it.
        OSError: The store fails.
    """
    if not store.is_remote(address):
        yield Lease(address)
        return
    before = _read(address)
    if before.get("token") and (before["host"] != socket.gethostname() or _is_alive(before["pid"])):
        until = time.monotonic() + WATCH
        while time.monotonic() < until:
            time.sleep(WATCH / 10)
            if (now := _read(address)) != before:
                if now.get("token"):
                    raise ValueError(_refusal(address, now))
                break  # it has ended
    token = {"token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    _write(address, {**token, "number": 0})
    time.sleep(SETTLE)
    if (now := _read(address)).get("token") != token["token"]:
        raise ValueError(_refusal(address, now))
    # A forked process, not a thread: the workers are forked too, and would inherit a thread's locks.
    context = multiprocessing.get_context("fork")
    has_ended = context.Event()  # a SIGTERM may meet a handler of this process's libraries in the new one, and be lost
    process = context.Process(target=_beat, args=(address, token, has_ended), daemon=True)
    process.start()
    try:
        yield Lease(address, process)
    finally:
        has_ended.set()
        process.join(BEAT)
        process.kill()
        process.join()
        with suppress(OSError):
            if _read(address).get("token") == token["token"]:
                _write(address, {"host": token["host"], "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})


def _beat(address: str, token: dict[str, Any], has_ended: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=store.die_with_parent, daemon=True).start()
    number = 0
    while not has_ended.wait(BEAT):
        number += 1
        with suppress(OSError):  # a store that is down says nothing of another conversion
            if _read(address).get("token") not in (token["token"], None):
                os._exit(1)
            _write(address, {**token, "number": number})


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _place(address: str) -> tuple[str, str]:
    """Return where the object is: next to the data set, of a bucket's own in it."""
    above, _, name = address.rstrip("/").rpartition("/")
    return (above, f".{name}{SUFFIX}") if urlparse(address).path.strip("/") else (address, SUFFIX)


def _read(address: str) -> dict[str, Any]:
    place, name = _place(address)
    if not store.exists(place, name):
        return {}
    try:
        found = json.loads(store.read(place, name))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(address: str, content: dict[str, Any]) -> None:
    place, name = _place(address)
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "out")
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        store.upload(folder, [name], place)


def _refusal(address: str, other: dict[str, Any]) -> str:
    where = f"process {other.get('pid', '?')} on {other.get('host', 'another machine')}"
    return f"another conversion is writing {redact(address)} ({where}): wait for it, or stop it"
