"""Answer HTTP requests with a trained model: `python -m recipe.serve MODEL`; see --help and recipe/README.md."""

import sys

from recipe.configure import one_line_errors
from recipe.console import setup_logging
from recipe.serve.options import parse

if __name__ == "__main__":
    setup_logging()
    parse(sys.argv[1:])  # before the imports below, which take seconds

import argparse
import socket

try:
    import uvicorn

    from recipe.serve.app import make_app
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed: pip install '.[serve]'")

from recipe.inference.detector import Detector

BACKLOG = 2048  # connections that wait to be taken in


def main(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT; requests that were let in are answered first.

    Raises:
        ValueError: The model cannot be used, or the address.
    """
    address = bind(args.host, args.port)  # before the model is read, but nobody can connect until it is
    detector = Detector.from_pretrained(
        args.model, config=args.config, calibration=args.calibration, batch_size=args.batch_size
    )
    app = make_app(detector, args.limits, args.allow_host)
    config = uvicorn.Config(app, access_log=False, log_level="warning", timeout_keep_alive=15)
    address.listen(BACKLOG)
    host, port = address.getsockname()[:2]
    print(f"{args.model} answers at http://{host}:{port}/ (its interface: /docs); end it with Ctrl+C", flush=True)
    uvicorn.Server(config).run(sockets=[address])


def bind(host: str, port: int) -> socket.socket:
    """Return a socket of an address; raise ValueError if the address cannot be used."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror}; give another --port or --host") from error
    return found


if __name__ == "__main__":
    with one_line_errors():
        try:
            main(parse(sys.argv[1:]))
        except ValueError as failure:
            sys.exit(f"error: {failure}")
