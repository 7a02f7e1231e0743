"""Parse the command line of `python -m recipe.serve`, without heavy imports: a mistake costs no seconds."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What a server takes in, and for how long it waits.

    Attributes:
        max_requests: At once, those that wait for the model included; one more is refused until later.
        max_bytes: Of a request's body, and of an image behind a URL.
        max_pixels: Of an image, judged by its header before it is decoded.
        receive_seconds: For a client to send its body, and to fetch an image behind a URL.
        answer_seconds: For an answer, from when the body is there.
        max_batch_tokens: Of the images that are answered at once: the longest conversation times their number.
    """

    max_requests: int = 256
    max_bytes: int = 20 * MIB
    max_pixels: int = 50_000_000
    receive_seconds: float = 15.0
    answer_seconds: float = 120.0
    max_batch_tokens: int = 16384


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line, with `limits`; --help and a wrong flag end the process."""
    default = Limits()
    parser = argparse.ArgumentParser(
        prog="python -m recipe.serve",
        description="Answer HTTP requests with a trained model: a page at /, images to /predict, the rest at /docs.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder of export.py, a .pt file, or a name on the hub")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address; 0.0.0.0 for all. Default: %(default)s, this machine"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free one; default %(default)s")
    parser.add_argument("--config", metavar="YAML", help="default: what was saved with the model")
    parser.add_argument("--calibration", type=Path, metavar="YAML", help="from eval.py: calibrated scores")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once; default %(default)s")
    what = "tokens of the images at once; default %(default)s"
    parser.add_argument("--max-batch-tokens", type=int, default=default.max_batch_tokens, metavar="N", help=what)
    what = "requests at once, waiting ones included; more are refused (429). Default %(default)s"
    parser.add_argument("--max-requests", type=int, default=default.max_requests, metavar="N", help=what)
    what = "MiB of a request; default %(default)s"
    parser.add_argument("--max-mib", type=int, default=default.max_bytes // MIB, metavar="N", help=what)
    what = "pixels of an image; default %(default)s"
    parser.add_argument("--max-pixels", type=int, default=default.max_pixels, metavar="N", help=what)
    what = "seconds for a client to send a request; default %(default)g"
    parser.add_argument("--receive-seconds", type=float, default=default.receive_seconds, metavar="S", help=what)
    what = "seconds for an answer; default %(default)g"
    parser.add_argument("--answer-seconds", type=float, default=default.answer_seconds, metavar="S", help=what)
    what = "fetch images from https://HOST/...; repeatable. Default: no image is fetched"
    parser.add_argument("--allow-host", action="append", default=[], metavar="HOST", help=what)
    args = parser.parse_args(arguments)
    positive = ("batch_size", "max_batch_tokens", "max_requests", "max_mib", "max_pixels")
    for name in (*positive, "receive_seconds", "answer_seconds"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port}: must be between 0 and 65535")
    for host in args.allow_host:
        if not host or set("/:@*[]") & set(host):
            parser.error(f"--allow-host {host!r}: give a host's name alone, such as images.example.org")
    args.limits = Limits(
        args.max_requests,
        args.max_mib * MIB,
        args.max_pixels,
        args.receive_seconds,
        args.answer_seconds,
        args.max_batch_tokens,
    )
    return args
