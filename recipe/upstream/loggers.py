"""Loggers that cannot end a run: any failure switches the logger off, and W&B goes offline when unreachable."""

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
import wandb
from composer.core import Event, State
from composer.loggers import Logger, LoggerDestination, WandBLogger
from wandb.sdk.lib import module, service_token
from wandb.sdk.wandb_run import Run
from wandb.sdk.wandb_setup import _WandbSetup

from recipe.redact import redact, redact_text

log = logging.getLogger(__name__)

REST = 60.0  # seconds without a call after one that failed, so that a full disk or a dead process costs no time


class GuardedLogger(LoggerDestination):
    """Stands before a logger's class in a list of bases: an error of that class is told once, and never raised.

    After an error the logger rests, then it is tried again; how many of its calls were lost is told at the end.
    Hyperparameters pass without their secrets.
    """

    _resting_until = 0.0
    _has_failed = False
    _num_lost = 0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """What the logger does at an event of training."""
        self._attempt(super().run_event, event, state, logger)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Those of the run."""
        self._attempt(super().log_hyperparameters, redact(hyperparameters))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Numbers of one step."""
        self._attempt(super().log_metrics, metrics, step)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """A table."""
        self._attempt(super().log_table, *args, **kwargs)

    def log_images(self, *args: Any, **kwargs: Any) -> None:
        """Pictures."""
        self._attempt(super().log_images, *args, **kwargs)

    def log_traces(self, traces: dict[str, Any]) -> None:
        """What algorithms did."""
        self._attempt(super().log_traces, traces)

    def upload_file(self, *args: Any, **kwargs: Any) -> None:
        """A file, for loggers that keep files."""
        self._attempt(super().upload_file, *args, **kwargs)

    def close(self, state: State, logger: Logger) -> None:
        """Ends the logger, and tells what was lost."""
        self._resting_until = 0.0
        self._attempt(super().close, state, logger)
        if self._num_lost:
            log.warning("%s lost %d calls of this run", type(self).__name__, self._num_lost)
            self._num_lost = 0

    def _attempt(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if time.monotonic() < self._resting_until:
            self._num_lost += 1
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # told, not raised: no log is worth the run
            self._num_lost += 1
            self._resting_until = time.monotonic() + REST
            if not self._has_failed:
                self._has_failed = True
                reason = redact_text(f"{type(error).__name__}: {error}")
                name = type(self).__name__
                log.warning("%s failed and is tried again every %.0f s; the run goes on: %s", name, REST, reason)


PROBE_SECONDS = 10.0  # for the server's first answer
START_SECONDS = 30.0  # for the server to open the run
FINISH_SECONDS = 120.0  # for what is left to be sent at the end


class SafeWandBLogger(GuardedLogger, WandBLogger):
    """Composer's, with bounds on time and without what may hold secrets.

    In the mode `online` a server that does not answer well holds up the start by at most `PROBE_SECONDS +
    START_SECONDS` and some seconds for a new start of wandb's own process; then the run is logged offline. A server
    that dies later is not noticed by training, and holds up the end by at most `FINISH_SECONDS`. Either way the data
    is in the run folder, and the warning tells how to send it.

    Neither the command's arguments nor the state of the git checkout, which may name secrets and the user of an
    address, are recorded: the resolved configuration is in the run folder. `init_kwargs: {settings: ...}` overrides.
    """

    def init(self, state: State, logger: Logger) -> None:
        """Opens the run, online if the server plays along; every rank takes part, rank 0 alone asks the server."""
        settings = {"disable_git": True, "disable_code": True, "init_timeout": START_SECONDS, "_args": []}
        # Else a table asks the server for its version, offline too, and waits minutes for an answer.
        settings["allow_offline_artifacts"] = False
        os.environ.setdefault("WANDB_SILENT", "true")  # else four lines at the start and some 90 at the end
        settings |= self._init_kwargs.get("settings") or {}
        self._init_kwargs = {**redact(self._init_kwargs), "settings": settings}  # settings may hold the key to log in
        if self._enabled and self._init_kwargs.get("mode") == "online":
            try:
                within(PROBE_SECONDS, ask_server)
            except Exception as error:  # told in the warning
                self._fall_back("offline", error)
        for mode in ("offline", "disabled"):
            try:
                # An error of rank 0 comes before the ranks meet in here, so the others are still waiting for it.
                super().init(state, logger)
                break
            except Exception as error:  # told in the warning
                stop_service()
                self._fall_back(mode, error)
        else:
            super().init(state, logger)
        if self._enabled:
            atexit.register(self._finish)  # before wandb's own hook, which waits without end

    def post_close(self) -> None:
        """Sends what is left."""
        self._finish()

    def _fall_back(self, mode: str, error: Exception) -> None:
        self._init_kwargs["mode"] = mode
        remedy = "later: wandb sync WANDB_FOLDER" if mode == "offline" else "nothing is kept for W&B"
        log.warning("W&B cannot be used as configured, so its mode is now %s (%s): %s", mode, remedy, _tell(error))

    def _finish(self) -> None:
        run = wandb.run
        if not self._enabled or run is None:
            return
        folder = Path(run.dir).parent
        failed = sys.exc_info()[0] is not None
        try:
            within(FINISH_SECONDS, lambda: wandb.finish(1 if failed else None))
        except Exception as error:  # told in the warning
            flush_records(run)
            stop_service()
            log.warning("W&B did not take all of the run; send it with `wandb sync %s`: %s", folder, _tell(error))
            return
        if self._init_kwargs.get("mode") == "offline":
            log.info("W&B: run in %s; send it with `wandb sync %s`", folder, folder)


def ask_server() -> None:
    """Asks W&B who the key belongs to.

    Raises:
        ValueError: There is no key, or it belongs to nobody.
        requests.RequestException: No answer, or not the answer of a W&B server that is well.
    """
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
    """Runs a call in a thread that is left behind where it takes longer.

    Raises:
        TimeoutError: It took longer.
        Exception: The call's own.
    """
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


def flush_records(run: Run) -> None:
    """Gets the last records of a run into its file.

    wandb's process writes blocks of 32 KiB and, when it is ended, forgets the last one: it is filled up with blanks,
    which go to the run's console output.
    """
    interface = run._backend and run._backend.interface
    if interface:
        interface.publish_output_raw("stdout", " " * 2 * 32768 + "\n")
        time.sleep(1)


def stop_service() -> None:
    """Ends wandb's own process, which tries for as long as a server does not answer, and forgets it.

    wandb 0.18 offers no way to do so in bounded time.
    """
    connection = _WandbSetup._instance and _WandbSetup._instance.service
    if connection and connection._proc and connection._proc._internal_proc:
        if connection._cleanup:
            connection._cleanup()
        connection._proc._internal_proc.kill()
        connection._proc._internal_proc.wait()
    service_token.clear_service_token()
    module.unset_globals()
    _WandbSetup._instance = None


def _tell(error: Exception) -> str:
    return redact_text(f"{type(error).__name__}: {error}")
