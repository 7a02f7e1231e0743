"""W&B that goes offline if its server cannot be reached. wandb takes half a second to import: import this when used.

wandb 0.18: an unreachable server blocks the start, `Table` and the end for minutes or indefinitely. Its process has no
bounded stop (`wandb/sdk/lib/service_connection.py`), and loses its last block of records when it is killed.

Delete this once wandb bounds `init` and `finish` in time.
"""

import atexit
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import requests
import wandb
from composer.core import Event, State
from composer.loggers import Logger, WandBLogger
from wandb.sdk.lib import module, service_token
from wandb.sdk.wandb_setup import _WandbSetup

from recipe.redact import redact
from recipe.upstream.loggers import GuardedLogger, describe

log = logging.getLogger(__name__)

PROBE_SECONDS = 10.0  # for the server's first answer
START_SECONDS = 30.0  # for the server to open the run
FINISH_SECONDS = 120.0  # for what is left to be sent at the end


class SafeWandBLogger(GuardedLogger, WandBLogger):
    """Composer's W&B logger with bounded waits, and without data that may hold secrets.

    If the server does not answer, mode `online` becomes `offline` after at most `PROBE_SECONDS + START_SECONDS` and
    some seconds to restart wandb's process. A server that dies later delays only the end, by at most `FINISH_SECONDS`.
    Either way the data is in the run folder, and a warning says how to send it.

    The command's arguments and the git state, which may hold secrets, are not recorded: the run folder has the resolved
    configuration. `init_kwargs: {settings: ...}` overrides this.
    """

    _metrics: Mapping[str, Any] = MappingProxyType({})  # of `_step`, not sent yet
    _step: int | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Open the run, online if the server answers; called by every rank, but only rank 0 asks the server."""
        os.environ.setdefault("WANDB_SILENT", "true")  # else four lines at the start and some 90 at the end
        settings = {
            "disable_git": True,
            "disable_code": True,
            "init_timeout": START_SECONDS,
            "_args": [],
            # Else a table asks the server for its version, even offline, and waits minutes for an answer.
            "allow_offline_artifacts": False,
            **(self._init_kwargs.get("settings") or {}),
        }
        self._init_kwargs = {**redact(self._init_kwargs), "settings": settings}  # settings may hold the API key
        if self._enabled and self._init_kwargs.get("mode") == "online":
            try:
                within(PROBE_SECONDS, ask_server)
            except Exception as error:  # logged by _fall_back
                self._fall_back("offline", error)
        python_random = random.getstate()  # wandb draws from it when its service is slow to start or to end
        for mode in ("offline", "disabled"):
            try:
                # An error of rank 0 comes before the ranks meet in here, so the others still wait for it.
                super().init(state, logger)
                break
            except Exception as error:  # logged by _fall_back
                stop_service()
                self._fall_back(mode, error)
        else:
            super().init(state, logger)
        random.setstate(python_random)
        if self._enabled:
            atexit.register(self._finish)  # before wandb's own hook, which waits indefinitely

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep the numbers of a step, which are sent at once: wandb keeps the row until the next step too."""
        if step != self._step:
            self._send()
        self._step = step
        self._metrics = {**self._metrics, **metrics}

    def _send(self) -> None:
        metrics, self._metrics = self._metrics, {}
        if metrics:
            super().log_metrics(dict(metrics), self._step)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """Log a table, after the numbers before it."""
        self._send()
        super().log_table(*args, **kwargs)

    def log_images(self, *args: Any, **kwargs: Any) -> None:
        """Log images, after the numbers before them."""
        self._send()
        super().log_images(*args, **kwargs)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Run the logger's part of an event; an evaluation's numbers do not wait for the next step."""
        if event in (Event.EVAL_END, Event.FIT_END, Event.EVAL_STANDALONE_END):
            self._send()
        super().run_event(event, state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Send what is kept and close."""
        self._send()
        super().close(state, logger)

    def post_close(self) -> None:
        """Send what is left."""
        self._finish()

    def _fall_back(self, mode: str, error: Exception) -> None:
        self._init_kwargs["mode"] = mode
        remedy = "later: wandb sync WANDB_FOLDER" if mode == "offline" else "nothing is kept for W&B"
        log.warning("W&B cannot be used as configured, so its mode is now %s (%s): %s", mode, remedy, describe(error))

    def _finish(self) -> None:
        run = wandb.run
        if not self._enabled or run is None:
            return
        folder = Path(run.dir).parent
        failed = sys.exc_info()[0] is not None
        python_random = random.getstate()
        try:
            within(FINISH_SECONDS, lambda: wandb.finish(1 if failed else None))
        except Exception as error:  # logged below
            # Its process writes blocks of 32 KiB and loses the last one when killed: blanks of console output fill it.
            interface = run._backend and run._backend.interface
            if interface:
                interface.publish_output_raw("stdout", " " * 2 * 32768 + "\n")
                time.sleep(1)
            stop_service()
            log.warning("W&B did not receive the whole run; send it with `wandb sync %s`: %s", folder, describe(error))
            return
        finally:
            random.setstate(python_random)
        if self._init_kwargs.get("mode") == "offline":
            log.info("W&B: run in %s; send it with `wandb sync %s`", folder, folder)


def ask_server() -> None:
    """Ask W&B whose the API key is; raise if there is no key, no answer, or the server does not know the key."""
    key = wandb.api.api_key
    if not key:
        raise ValueError("no API key: set WANDB_API_KEY or run `wandb login`")
    answer = requests.post(
        f"{wandb.api.settings('base_url')}/graphql",
        json={"query": "query { viewer { id } }"},
        auth=("api", key),
        timeout=PROBE_SECONDS,
    )
    answer.raise_for_status()
    if not (answer.json().get("data") or {}).get("viewer"):
        raise ValueError("the server does not know the API key")


def within(seconds: float, call: Callable[[], object]) -> None:
    """Run a call in a thread, raise its error, or abandon it after `seconds` with a TimeoutError."""
    errors: list[Exception] = []

    def work() -> None:
        try:
            call()
        except Exception as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if errors:
        raise errors[0]


def stop_service() -> None:
    """Kill wandb's own process, which retries for as long as a server does not answer, and forget it."""
    connection = _WandbSetup._instance and _WandbSetup._instance.service
    if connection and connection._proc and connection._proc._internal_proc:
        if connection._cleanup:
            connection._cleanup()
        connection._proc._internal_proc.kill()
        connection._proc._internal_proc.wait()
    service_token.clear_service_token()
    module.unset_globals()
    _WandbSetup._instance = None
