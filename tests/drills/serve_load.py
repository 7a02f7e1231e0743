"""Load a server on loopback with many clients, some with bad input; count what they got and print one line of JSON.

    python tests/drills/serve_load.py MODEL [--clients 200] [--requests 2000] [--batch-size 8] [--lone 40]

The server is `python -m recipe.serve` in a process of its own. Each client keeps asking, one request after the other.
One in twenty is bad: a truncated image, one just above the pixel limit, a text, a body over the size limit, or a client
that sends too slowly. A client that is refused for now (429) comes again. Then one client alone is compared with
`Detector` on the same bytes. Then SIGTERM comes while requests are being answered. Last `predict.py` runs on as many
images at the same batch size, in a process of its own.

The JSON: `statuses` by kind of request, `without_status`, `images_per_s` of the server and of `predict.py` and their
`throughput_ratio`; `lone_p50_ratio`; `memory_mib` after the first hundred requests and at the end; `worst_box` (pixels)
and `worst_score`, the differences of all `compared` objects from those of `predict.py`, `other_captions`, and
`other_numbers_of_objects` of answers; `answered_after_sigterm`.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from convert.shapes import draw_scene

ROOT = Path(__file__).resolve().parents[2]
SIDES = (56, 84, 112, 112, 112, 168)
MAX_PIXELS, MAX_MIB, RECEIVE_SECONDS = 400 * 400, 1, 3
BAD = {"truncated": 400, "large": 413, "text": 400, "oversize": 413, "slow": 408}  # the status of each


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lone", type=int, default=40, help="requests of one client alone")
    return parser.parse_args()


class Server:
    """`python -m recipe.serve`."""

    def __init__(self, args: argparse.Namespace):
        command = [sys.executable, "-m", "recipe.serve", args.model, "--port", "0", f"--batch-size={args.batch_size}"]
        limits = [f"--max-pixels={MAX_PIXELS}", f"--max-mib={MAX_MIB}", f"--receive-seconds={RECEIVE_SECONDS}"]
        self.process = subprocess.Popen([*command, *limits], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.port = int(line.split("http://127.0.0.1:")[1].split("/")[0])

    def memory_mib(self) -> float:
        """Return the resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


def images() -> list[bytes]:
    """Return scenes of several sizes."""
    return [draw_scene(seed=3, index=index, image_size=SIDES[index % len(SIDES)]).image for index in range(48)]


def bad_images(good: bytes) -> dict[str, bytes]:
    """Return a request's body of each kind of `BAD`."""
    file = BytesIO()
    Image.new("RGB", (401, 400)).save(file, "PNG")
    return {
        "truncated": good[: len(good) // 2],
        "large": file.getvalue(),
        "text": b"no image",
        "oversize": b"x" * (MAX_MIB * 2**20 + 1),
        "slow": good,
    }


async def ask(port: int, body: bytes, is_slow: bool = False) -> tuple[int | None, Any, float]:
    """Return status (None: the connection ended without one), content and seconds of a request on a new connection."""
    start = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return None, None, 0.0
    try:
        head = "POST /predict?threshold=0.05 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Length: {len(body)}\r\nContent-Type: application/octet-stream\r\n\r\n"
        writer.write(head.encode() + (body[:10] if is_slow else body))
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(), 120)
        top, _, content = answer.partition(b"\r\n\r\n")
        status = int(top.split()[1])
        return status, json.loads(content), time.perf_counter() - start
    except (OSError, IndexError, TimeoutError, ValueError):
        return None, None, 0.0
    finally:
        writer.close()


async def load(server: Server, pictures: Sequence[bytes], args: argparse.Namespace) -> dict[str, Any]:
    """Run all clients at once; return what they got."""
    numbers, statuses, retries = iter(range(args.requests)), defaultdict[str, Counter[str]](Counter), 0
    bad, memory, answers = bad_images(pictures[0]), list[float](), list[tuple[int, Any]]()
    done, kinds = 0, list(BAD)

    async def client() -> None:
        nonlocal done, retries
        for number in numbers:
            kind = kinds[number // 20 % len(kinds)] if number % 20 == 19 else "good"
            body = pictures[number % len(pictures)] if kind == "good" else bad[kind]
            while True:
                status, content, _ = await ask(server.port, body, kind == "slow")
                if status != 429:
                    break
                retries += 1
                await asyncio.sleep(0.2)
            statuses[kind][str(status)] += 1
            if kind == "good" and status == 200:
                answers.append((number % len(pictures), content))
            done += 1
            if done in (100, args.requests):
                memory.append(server.memory_mib())

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(args.clients)))
    seconds = time.perf_counter() - start
    good = statuses["good"]["200"]
    return {
        "statuses": {kind: dict(found) for kind, found in sorted(statuses.items())},
        "wrong_statuses": sum(
            count
            for kind, found in statuses.items()
            for status, count in found.items()
            if status != str(BAD.get(kind, 200))
        ),
        "without_status": sum(found["None"] for found in statuses.values()),
        "refused_for_now": retries,
        "images_per_s": round(good / seconds, 1),
        "memory_mib": [round(value) for value in memory],
        "answers": answers,
    }


async def lone(server: Server, detector: Any, pictures: Sequence[bytes], count: int) -> float:
    """Return the median time of one client alone over that of `Detector`, in turns."""
    own, others = list[float](), list[float]()
    for number in range(count + 4):
        body = pictures[number % len(pictures)]
        start = time.perf_counter()
        detector(body, threshold=0.05)
        others.append(time.perf_counter() - start)
        own.append((await ask(server.port, body))[2])
    return median(own[4:]) / median(others[4:])


def predict_files(args: argparse.Namespace, pictures: Sequence[bytes], count: int) -> tuple[float, list[Any]]:
    """Return the images per second of `predict.py`, without its start, and its answers for the images."""
    with TemporaryDirectory() as folder:
        rates, rows = [], []
        for number in (len(pictures), len(pictures) + count):
            inputs, out = Path(folder, f"in{number}"), Path(folder, f"out{number}")
            inputs.mkdir()
            for index in range(number):
                (inputs / f"{index:05}.png").write_bytes(pictures[index % len(pictures)])
            command = [
                sys.executable,
                "recipe/predict.py",
                "--checkpoint",
                args.model,
                "--out",
                str(out),
                "--no-drawings",
            ]
            start = time.perf_counter()
            subprocess.run(
                [*command, "--score-threshold=0.05", f"--batch-size={args.batch_size}", str(inputs)],
                cwd=ROOT,
                check=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
            )
            rates.append(time.perf_counter() - start)
            rows.append(json.loads((out / "predictions.json").read_text()))
    return count / (rates[1] - rates[0]), rows[0]


def differences(answers: Sequence[tuple[int, Any]], rows: Sequence[Any]) -> dict[str, Any]:
    """Return the largest of boxes and scores over all answers, and how many differ in number of objects or caption."""
    worst_box, worst_score, captions, numbers, compared = 0.0, 0.0, 0, 0, 0
    for place, answer in answers:
        found, expected = answer["objects"], rows[place]["objects"]
        if len(found) != len(expected):
            numbers += 1
            continue
        for one, other in zip(found, expected, strict=True):
            worst_box = max(worst_box, *(abs(a - b) for a, b in zip(one["box"], other["box"], strict=True)))
            worst_score = max(worst_score, abs(one["score"] - other["score"]))
            captions += one["caption"] != other["caption"]
            compared += 1
    worst = {"worst_box": worst_box, "worst_score": worst_score}
    return {**worst, "other_captions": captions, "other_numbers_of_objects": numbers, "compared": compared}


async def stop(server: Server, pictures: Sequence[bytes]) -> dict[str, int]:
    """Send SIGTERM once five of sixty requests are answered; return what all of them got."""
    asked = [asyncio.create_task(ask(server.port, pictures[number % len(pictures)])) for number in range(60)]
    while sum(task.done() for task in asked) < 5:
        await asyncio.sleep(0.005)
    server.process.send_signal(signal.SIGTERM)
    statuses = Counter(str(status) for status, _, _ in await asyncio.gather(*asked))
    server.process.wait(60)
    return dict(statuses)


def main() -> None:
    """Measure and report."""
    args = parse()
    pictures = images()
    from recipe import Detector

    server = Server(args)
    try:
        asyncio.run(load(server, pictures, argparse.Namespace(clients=4, requests=20)))  # warms up
        found = asyncio.run(load(server, pictures, args))
        detector = Detector.from_pretrained(args.model)
        found["lone_p50_ratio"] = round(asyncio.run(lone(server, detector, pictures, args.lone)), 3)
        found["answered_after_sigterm"] = asyncio.run(stop(server, pictures))
    finally:
        server.process.kill()
    rate, rows = predict_files(args, pictures, args.requests)
    found |= differences(found.pop("answers"), rows)
    found["predict_images_per_s"] = round(rate, 1)
    found["throughput_ratio"] = round(found["images_per_s"] / rate, 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
