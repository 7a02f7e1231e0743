"""Fixtures of the data tests: a tiny checkpoint's processor, an encoder, samples and shards."""

import gc
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter
from transformers import AutoProcessor, Qwen2_5_VLConfig

from recipe.config import ImageConfig, PromptConfig
from recipe.data.encode import Encoder
from recipe.data.image import image_spec
from recipe.records import RECORDS_FILE, join_parts, to_record, write_part
from recipe.schema import MDS_COLUMNS, FurtherImage, ImageSpec, Object, Sample
from recipe.tiny import build_tiny_checkpoint
from tests.data.storage_cases import write_rows
from tests.support.s3_server import FaultProxy, S3Server

MakeSample = Callable[..., Sample]
WriteShards = Callable[[Path, Sequence[Sample]], dict[str, str]]


@pytest.fixture(scope="session", autouse=True)
def quick_garbage_collection() -> None:
    """What the imports made is not looked through again at the end of every test: half a second each."""
    gc.freeze()


@pytest.fixture(autouse=True)
def release_shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streaming frees shared memory at exit only, and each new data set opens that of all before it once more."""
    cleanups: list[Callable[[], None]] = []
    monkeypatch.setattr("streaming.base.shared.memory.atexit", SimpleNamespace(register=cleanups.append))
    yield
    gc.collect()
    for cleanup in cleanups:
        with suppress(BufferError):
            cleanup()


@pytest.fixture(autouse=True)
def own_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No plan of an earlier run of the tests is read."""
    monkeypatch.setattr("recipe.data.mapped.gettempdir", lambda: str(tmp_path))


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits before a second attempt, and for the workers of a DataLoader that has failed (torch: 5 s each)."""
    monkeypatch.setattr("recipe.upstream.fetch.FIRST_BACKOFF", 0.01)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.3)


@pytest.fixture
def store(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the S3 server, which holds rows at `s3://rows/set`; the environment points to it."""
    s3.upload(write_rows(tmp_path / "written"), "rows", "set")
    with FaultProxy(s3.endpoint) as proxy:
        for name, value in proxy.env.items():
            monkeypatch.setenv(name, value)
        yield proxy
    # An abandoned fetch retries for seconds, and botocore draws its waits from Python's shared generator.
    for thread in threading.enumerate():
        if thread.name.startswith("fetch "):
            thread.join(60)
            assert not thread.is_alive(), thread.name


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tiny"))
    build_tiny_checkpoint(folder, hidden_size=64, num_layers=1, vision_hidden_size=32, vision_depth=1)
    return folder


@pytest.fixture(scope="session")
def processor(tiny_folder: str) -> Any:
    return AutoProcessor.from_pretrained(tiny_folder, use_fast=True)


@pytest.fixture(scope="session")
def hf_config(tiny_folder: str) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def spec(processor: Any) -> ImageSpec:
    return image_spec(processor.image_processor, ImageConfig())


@pytest.fixture(scope="session")
def encoder(processor: Any, hf_config: Qwen2_5_VLConfig, spec: ImageSpec) -> Encoder:
    return Encoder(processor.tokenizer, hf_config, spec, PromptConfig(), max_caption_tokens=32, max_seq_len=4096)


@pytest.fixture(scope="session")
def make_sample() -> MakeSample:
    """An image of noise with `num_objects` objects (None: not annotated); `number` seeds both."""

    def make(number: int = 0, num_objects: int | None = 2, width: int = 80, height: int = 60, **changes) -> Sample:
        rng = np.random.default_rng(number)
        stream = BytesIO()
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(stream, "png")
        objects = None
        if num_objects is not None:
            objects = tuple(
                Object((5.0 * i, 3.0 * i + 1, 5.0 * i + 20 + number % 7, 3.0 * i + 30), f"red star {number} {i}")
                for i in range(num_objects)
            )
        fields = {"id": f"sample-{number}", "image": stream.getvalue(), "width": width, "height": height}
        return Sample(**{**fields, "objects": objects, **changes})

    return make


@pytest.fixture(scope="session")
def make_chat(make_sample: MakeSample) -> MakeSample:
    """A chat about images of noise: two in the first question, if there are, then one in each further one.

    The first answer has a box of the first image, the others of the image before them; the last is not annotated.
    """

    def make(number: int = 0, num_images: int = 3) -> Sample:
        views = [make_sample(1000 * number + at, at + 1, 56 + 28 * at, 60) for at in range(num_images)]
        views[-1] = replace(views[-1], objects=None)
        shown = [min(2, num_images)] + [1] * (num_images - 2)
        turns: list[dict[str, Any]] = []
        for at, count in enumerate(shown):
            box = {"type": "box", "box": [4.0, 5.0, 40.0, 30.0], "image": at + 1 if at else 0}
            turns.append({"role": "user", "content": "<image>" * count + f"question {at}"})
            turns.append({"role": "assistant", "content": [{"type": "text", "text": "at "}, box]})
        further = tuple(FurtherImage(item.image, item.width, item.height, item.objects) for item in views[1:])
        return replace(views[0], id=f"chat-{number}", messages=tuple(turns), further=further)

    return make


@pytest.fixture(scope="session")
def write_shards() -> WriteShards:
    """Writes samples to a folder and returns the keywords of a stream over it."""

    def write(folder: Path, samples: Sequence[Sample]) -> dict[str, str]:
        with MDSWriter(out=str(folder), columns=dict(MDS_COLUMNS), size_limit=1 << 15, hashes=["xxh64"]) as writer:
            for sample in samples:
                writer.write(sample.to_mds())
        write_part(folder / "part", map(to_record, samples))
        join_parts(folder / RECORDS_FILE, [folder / "part"], json.loads((folder / "index.json").read_text()))
        (folder / "part").unlink()
        return {"local": str(folder)}

    return write
