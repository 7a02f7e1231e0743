"""Check the comparison on real sets: reading, splits, sizes, jobs that are found again, figures of the last line."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import compare_real
import convergence
import jobs
import our_head
from convert.shapes import draw_scene
from jobs import Job, ResultError, Store
from peer_detr import PEERS
from real_report import figures_of, print_tables
from real_sets import (
    AUGMENTS,
    LEAST_PIXELS,
    MOST_PIXELS,
    REAL,
    YAML,
    SetError,
    augmentation_of,
    batch_size,
    find_set,
    fingerprint,
    image_spec_of,
    pixel_budget,
    read_set,
    result_of,
    shrink,
    split_set,
)
from recipe.callbacks import table
from recipe.config import AugmentConfig
from recipe.configure import load_config
from recipe.data.augment import Augmentation
from recipe.data.image import resized_size
from recipe.images import open_image
from recipe.schema import ImageSpec, Object, Sample

JOB = Job("set", "boxes", "fcos", 17, "test", 1.0, {"data": "abc", "cpu_seconds": 300, "augment": "none"})


def write_set(folder: Path, images: str = "images", count: int = 14, around: int = 1) -> Path:
    """Write scenes of two sizes: the first image is empty, the second has a degenerate box too, the third a crowd.

    Images are `around` times as wide and as high as their scenes, in the top left corner.
    """
    (folder / images).mkdir(parents=True)
    entries, boxes, names = [], [], ["thing"]
    for index in range(count):
        scene = draw_scene(seed=3, index=index, image_size=(96, 128)[index % 2], min_objects=1, max_objects=3)
        name, side = f"{index}.png", scene.width * around
        image = Image.new("RGB", (side, side))
        image.paste(open_image(scene.image))
        image.save(folder / images / name)
        entries.append({"id": index, "file_name": name, "width": side, "height": side})
        for item in (scene.objects or ()) if index else ():
            word = item.caption.split()[-1]
            names = names if word in names else [*names, word]
            x1, y1, x2, y2 = item.box
            box = {"image_id": index, "category_id": names.index(word), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            boxes.append({**box, "iscrowd": int(index == 2)})
    boxes.append({"image_id": 1, "category_id": 0, "bbox": [5, 5, 0, 7]})
    rows = {
        "images": entries,
        "annotations": [{"id": number, **box} for number, box in enumerate(boxes, 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
    }
    (folder / "instances.json").write_text(json.dumps(rows))
    return folder


def test_a_set_is_read_as_conversion_reads_it(tmp_path: Path) -> None:
    samples, left_out = read_set(write_set(tmp_path / "a"))
    assert left_out == {"box left out: zero-area box": 1}
    assert [sample.id for sample in samples] == [f"a/{index}" for index in range(14)]
    assert {(sample.width, sample.height) for sample in samples} == {(96, 96), (128, 128)}
    assert samples[0].objects == ()
    assert all(item.iscrowd for item in samples[2].objects or ())
    beside, _ = read_set(write_set(tmp_path / "b", images="."))
    assert [one.objects for one in beside] == [one.objects for one in samples]


def test_what_a_set_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SetError, match="no is not a folder"):
        find_set(tmp_path / "no")
    with pytest.raises(SetError, match=r"no instances\.json but no JSON file"):
        find_set(tmp_path)
    folder = write_set(tmp_path / "set")
    (folder / "images" / "0.png").unlink()
    with pytest.raises(SetError, match=r"the first image of .*, '0\.png', is neither in .*images nor in"):
        find_set(folder)
    (folder / "instances.json").rename(folder / "a.json")
    (folder / "b.json").write_text("{}")
    with pytest.raises(SetError, match=r"no instances\.json but a\.json, b\.json"):
        find_set(folder)
    for names, message in (
        (["chess_train", str(folder)], f"no chess_train in {tmp_path}: give --real"),
        ([str(write_set(tmp_path / "c" / "d")), str(write_set(tmp_path / "d"))], "two sets have the name 'd'"),
        ([str(write_set(tmp_path / "few", count=9))], "has 9 usable images: give a set of at least 10"),
    ):
        with pytest.raises(SystemExit):
            convergence.main(["--variants", "--real", str(tmp_path), "--real-sets", *names])
        assert message in capsys.readouterr().err


def sample_of(side: float, size: int = 1000, number: int = 1, iscrowd: bool = False) -> Sample:
    """Return an image of `number` objects whose shorter side is `side`."""
    box = (0.0, 0.0, side, min(2 * side, size))
    return Sample("one", b"", size, size, (Object(box, "thing", iscrowd),) * number)


def test_pixel_budget_by_hand() -> None:
    """50 of 1,000 pixels are 24 at 480 x 480 = 230,400, of which 166 tokens more than the least are the next."""
    assert pixel_budget([sample_of(50)]) == LEAST_PIXELS + 166 * 28**2 == 230_496
    assert pixel_budget([sample_of(200)]) == LEAST_PIXELS == 100_352
    assert pixel_budget([sample_of(1)]) == MOST_PIXELS == 1_003_520
    assert pixel_budget([sample_of(1, size=640)]) == (23 * 28) ** 2  # as it is stored, to the nearest token
    assert pixel_budget([sample_of(1, size=64)]) == LEAST_PIXELS
    assert pixel_budget([replace(sample_of(1), objects=())]) == LEAST_PIXELS
    # The first quartile, without crowds, over images of any size.
    assert pixel_budget([sample_of(50, number=76), sample_of(1, number=24)]) == 230_496
    assert pixel_budget([sample_of(50, number=74), sample_of(1, number=26)]) == MOST_PIXELS
    assert pixel_budget([sample_of(50), sample_of(1, number=9, iscrowd=True)]) == 230_496
    assert pixel_budget([sample_of(24, size=480), sample_of(50)]) == 230_496


def test_steps_cost_about_the_same() -> None:
    assert [batch_size(pixels) for pixels in (100_352, 149_744, 230_496, 414_736, 1_003_520)] == [8, 5, 3, 2, 2]


def test_nothing_is_chosen_by_the_test() -> None:
    samples = [replace(sample_of(50), id=str(number)) for number in range(100)]
    parts = {part: [{one.id for one in rows} for rows in split_set(samples, part)] for part in ("test", "choice")}
    assert [len(rows) for part in parts.values() for rows in part] == [80, 20, 64, 16]
    assert parts["choice"][0] | parts["choice"][1] == parts["test"][0]
    assert len(parts["test"][0] | parts["test"][1]) == 100
    with pytest.raises(ValueError, match="unknown part 'val'"):
        split_set(samples, "val")


def test_augmentation_is_one_setting() -> None:
    """Each is a section of the yaml, which the peers read too."""
    found = {name: augment_section(name, 414_736) for name in AUGMENTS}
    assert found["none"] is None
    assert found["auto"] == found["parts"]
    flip, crop = found["flip"], found["crop"]
    assert flip is not None and crop is not None and crop.crop is not None
    assert (flip.horizontal_flip, flip.crop, crop.horizontal_flip) == (0.5, None, 0.5)


def augment_section(name: str, pixels: int) -> AugmentConfig | None:
    section, _ = augmentation_of(name, pixels)
    return load_config(str(YAML), [f"train_loader.augment={section}"]).train_loader.augment


def test_large_images_are_trained_on_parts() -> None:
    """Of about the least budget, and as many per step; nothing is cropped if that is the whole image."""
    budgets = (LEAST_PIXELS, 149_744, 2 * LEAST_PIXELS, 414_736, MOST_PIXELS)
    assert [augmentation_of("parts", pixels)[1] for pixels in budgets] == [1, 0.6702, 0.5, 0.242, 0.1]
    assert [augmentation_of("auto", pixels)[1] for pixels in budgets] == [1, 1, 1, 0.242, 0.1]
    assert augmentation_of("auto", 2 * LEAST_PIXELS) == augmentation_of("none", LEAST_PIXELS) == ("null", 1)
    assert {augmentation_of(name, MOST_PIXELS)[1] for name in ("none", "flip", "crop")} == {1}
    whole, part = (augment_section("parts", pixels) for pixels in (LEAST_PIXELS, MOST_PIXELS))
    assert whole is not None and whole.crop is not None and part is not None and part.crop is not None
    assert (whole.horizontal_flip, whole.crop.scale, part.crop.scale) == (0.5, [1, 1], [0.1, 0.1])
    assert (part.crop.probability, part.crop.ratio, part.crop.enlarge) == (1, [1, 1], False)


def test_a_part_has_the_scale_of_the_whole_image() -> None:
    """1,000 x 1,000 pixels are shown as 476 x 476, and 0.4354 of them as 315 x 315: objects of 50 are 23.8 in both."""
    data = BytesIO()
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)).save(data, "PNG")
    sample = replace(sample_of(50), image=data.getvalue(), objects=(Object((400, 300, 450, 400), "thing", area=4000),))
    pixels = pixel_budget([sample])
    section, (_, share) = augment_section("parts", pixels), augmentation_of("parts", pixels)
    spec = image_spec_of([sample], pixels, share)
    assert (pixels, share, spec.max_pixels, spec.min_pixels) == (230_496, 0.4354, 230_496, 27_308)
    shrunk = shrink(sample, spec)
    assert (
        (shrunk.width, shrunk.height) == open_image(shrunk.image).size == resized_size(1000, 1000, spec) == (476, 476)
    )
    assert shrunk.objects is not None and shrunk.objects[0].box == pytest.approx((190.4, 142.8, 214.2, 190.4))
    assert shrunk.objects[0].area == pytest.approx(4000 * 0.476**2)
    assert shrink(shrunk, spec) is shrunk
    assert section is not None
    augmentation = Augmentation.of(section, spec, seed=1)
    for words in augmentation.words(0, 0, 20):
        part, drawn = augmentation.draw(shrunk, words)
        assert drawn is not None and drawn.size == (315, 315)
        assert resized_size(*drawn.size, spec) == (308, 308)
        assert part.objects is not None
        x1, y1, x2, y2 = part.objects[0].box
        assert (x2 - x1, y2 - y1) == pytest.approx((23.8, 47.6), abs=1e-4)


def test_no_part_is_enlarged() -> None:
    """A tenth of 256 x 256 pixels, the least that a whole image is shown with but for 2,816, is shown as it is."""
    section, share = augment_section("parts", MOST_PIXELS), augmentation_of("parts", MOST_PIXELS)[1]
    assert section is not None
    spec = ImageSpec(14, 2, round(REAL["image.min_pixels"] * share), MOST_PIXELS, (0.5,) * 3, (0.5,) * 3)
    augmentation = Augmentation.of(section, spec, seed=1)
    _, drawn = augmentation.draw(sample_of(20, size=256), augmentation.words(0, 0, 1)[0])
    assert drawn is not None and drawn.size == (81, 81)  # of 80.95, rounded up


def test_everybody_is_given_parts_and_judged_on_whole_images(
    benchmark: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one shrunk set; what was used is part of the job."""
    given: list[Any] = []

    def train(job: Job, train: list[Sample], held_out: list[Sample], spec: ImageSpec, *_: Any) -> dict[str, Any]:
        given.append((job, train, held_out, spec))
        return {"ap50": 0.5, "ap": 0.2, "ap_small": None, "cpu_s": 1.0, "steps": 3}

    monkeypatch.setattr(compare_real, "train_ours", train)
    monkeypatch.setattr(compare_real, "train_and_judge", train)
    folder = write_set(tmp_path / "large", around=6)
    arguments = [*benchmark, "--real-models", "ours", "fcos", "--real-tasks", "boxes", "--seeds", "17"]
    convergence.main([*arguments, "--real-sets", str(folder)])
    assert len(given) == 2
    stored = read_set(folder)[0]
    pixels = pixel_budget(split_set(stored, "test")[0])
    assert 2 * LEAST_PIXELS < pixels < 576**2
    for job, train_samples, held_out, spec in given:
        assert (job.settings["augment"], job.settings["share"]) == augmentation_of("parts", pixels)
        assert (job.settings["pixels"], job.settings["batch_size"], spec.max_pixels) == (pixels, 8, pixels)
        assert {(sample.width, sample.height) for sample in train_samples} == {resized_size(768, 768, spec)}
        assert {sample.width for sample in held_out} <= {576, 768}
    convergence.main([*arguments, "--real-sets", str(folder), "--augment", "parts"])
    assert len(given) == 2  # found again: auto is what it resolves to
    convergence.main([*arguments, "--real-sets", str(folder), "--augment", "none"])
    assert [job.settings["batch_size"] for job, *_ in given[2:]] == [batch_size(pixels)] * 2
    assert {sample.width for _, samples, _, _ in given[2:] for sample in samples} == {576, 768}


def test_one_factor_on_all_of_our_rates() -> None:
    config, rates = load_config(str(YAML), []).optimizer, our_head.learning_rates(0.5)
    assert rates == {
        f"optimizer.lr_{name}": getattr(config, f"lr_{name}") / 2
        for name in ("vision", "merger", "llm", "adapter", "detection")
    }


def test_a_probe_measures_steps_without_the_first() -> None:
    curve = our_head.Curve()
    curve.ends = [0.0, 9.0, 10.0, 11.0, 13.0, 15.0, 17.0]
    assert curve.step_seconds() == pytest.approx(2)  # 11 to 17 in three steps
    curve.ends = curve.ends[:2]
    assert curve.step_seconds() == pytest.approx(9)


def test_scores_that_are_not_defined_are_null() -> None:
    scores = {"box_ap50": 0.51239, "box_ap": 0.0, "box_ap_small": -1.0, "box_ap75": 1.0}
    assert result_of(scores, 12, 3.14) == {"ap50": 0.5124, "ap": 0.0, "ap_small": None, "steps": 12, "cpu_s": 3.1}


def test_a_job_is_found_by_all_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "code_of", lambda model: f"code-{model}"[:8])
    monkeypatch.setattr(jobs, "commit", lambda: "1234567")
    store = Store(tmp_path / "results")
    assert store.find(JOB) is None and capsys.readouterr().out == ""
    row = store.write(JOB, {"ap50": 0.5})
    assert row["commit"] == "1234567" and row["versions"]["torch"] in torch.__version__
    assert row["settings"]["cpu_seconds"] == 300
    assert store.find(JOB) == row
    others = [
        replace(JOB, set="set-boxes"),
        replace(JOB, task="captions"),
        replace(JOB, model="ours"),
        replace(JOB, seed=18),
        replace(JOB, part="choice"),
    ]
    assert [store.find(other) for other in others] == [None] * 5
    assert capsys.readouterr().out == ""
    for changed, told in (
        (replace(JOB, rate=2.5), "rate 1.0, now 2.5"),
        (replace(JOB, settings={**JOB.settings, "augment": "flip"}), "augment none, now flip"),
    ):
        assert store.find(changed) is None
        assert capsys.readouterr().out == f"set, boxes, fcos, seed 17: stored with {told}\n"
    assert [path.name for path in store.folder.iterdir()] == [JOB.file_name("code-fco")]
    (store.folder / JOB.file_name("code-fco")).write_text('{"settings": ')
    with pytest.raises(ResultError, match="is not a result of this benchmark: delete it"):
        store.find(JOB)


def test_results_of_other_code_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    rows = []
    for code in ("aaa", "bbb"):
        monkeypatch.setattr(jobs, "code_of", lambda model, code=code: code)
        monkeypatch.setattr(jobs, "commit", lambda code=code: f"commit-{code}")
        rows.append(store.write(JOB, {"code": code}))
    assert store.find(JOB) == rows[1]
    monkeypatch.setattr(jobs, "code_of", lambda model: "ccc")
    assert store.find(JOB) is None
    assert "stored with other code, of commit commit-bbb (--accept-other-commits takes it)" in capsys.readouterr().out
    assert Store(tmp_path, accepts_other_code=True).find(JOB) == rows[1]


def test_what_decides_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours depends on the whole recipe, a peer's on few files: it is not trained again when our head changes."""

    def codes() -> list[str]:
        jobs.code_of.cache_clear()
        return [jobs.code_of("ours"), jobs.code_of("fcos")]

    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    for name in ("recipe/models/detection_head.py", "tests/benchmarks/peer_detr.py", "tests/benchmarks/real_sets.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    first = codes()
    (tmp_path / "recipe/models/detection_head.py").write_text("2")
    second = codes()
    (tmp_path / "tests/benchmarks/peer_detr.py").write_text("2")
    third = codes()
    (tmp_path / "tests/benchmarks/real_sets.py").write_text("2")
    fourth = codes()
    jobs.code_of.cache_clear()
    assert [a != b for a, b in zip(first, second, strict=True)] == [True, False]
    assert [a != b for a, b in zip(second, third, strict=True)] == [False, True]
    assert [a != b for a, b in zip(third, fourth, strict=True)] == [True, True]


def test_files_that_decide_results_exist() -> None:
    for pattern in (*jobs.SHARED_CODE, *jobs.OUR_CODE, *jobs.PEER_CODE):
        assert list(jobs.ROOT.glob(pattern)), pattern


def found(model: str, seed: int, ap50: float | None, ap_small: float | None = None, chosen: bool = False) -> Any:
    job = replace(JOB, model=model, seed=seed)
    result = {"ap50": ap50, "ap": 0.1, "ap_small": ap_small, "cpu_s": 300.0 + seed, "steps": 9}
    return job, chosen, {"settings": job.described(), "result": result}


def test_figures_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        *(found("ours", seed, ap50) for seed, ap50 in ((1, 0.6), (2, 0.8), (3, 0.7))),
        *(found("fcos", seed, ap50, ap_small=0.2) for seed, ap50 in ((1, 0.9), (2, 0.1), (3, 0.2))),
        *(found("rt_detr", seed, ap50) for seed, ap50 in ((1, 0.5), (2, 0.3))),
        found("conditional", 1, None),
    ]
    figures = figures_of(rows)
    assert figures["rates"] == "default"
    entry = figures["real"]["set"]["boxes"]
    assert entry["ours"]["ap50"] == [0.7, 0.6, 0.8]
    assert entry["ours"]["ap_small"] is None
    assert entry["ours"]["cpu_s"] == [302, 301, 303]
    assert entry["ours"]["seeds"] == [1, 2, 3]
    assert entry["fcos"]["ap_small"] == [0.2, 0.2, 0.2]
    assert entry["conditional"]["ap50"] is None
    assert entry["peer"] == {"name": "rt_detr", **entry["rt_detr"]}  # .4 of two seeds against .2
    assert entry["rt_detr"]["ap50"] == [0.4, 0.3, 0.5]
    assert entry["cpu_s"] == 302
    print_tables(figures["real"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[2] == "| ours | 0.700 (0.600-0.800) | 0.100 | - | 302 (301-303) | 3 | 1 |"
    assert [line.split()[1] for line in lines[2:]] == ["ours", "rt_detr", "fcos", "conditional"]
    partly = figures_of([found("ours", 1, 0.6, ap_small=0.2), found("ours", 2, 0.6)])
    assert partly["real"]["set"]["boxes"]["ours"]["ap_small"] is None
    mixed = [found("ours", 1, 0.6, chosen=True), found("fcos", 1, 0.6)]
    assert figures_of(mixed)["rates"] == "partly chosen"
    assert figures_of(mixed[:1])["rates"] == "chosen"
    assert figures_of([]) == {"real": {}, "rates": "default"}


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield the command on a small set, in folders of its own; restore what it changes in this process."""
    monkeypatch.setattr(convergence, "FOLDER", tmp_path / "bench")
    monkeypatch.setattr(table, "CALLBACKS", table.CALLBACKS)
    threads, level = torch.get_num_threads(), logging.root.manager.disable
    folder = write_set(tmp_path / "scenes")
    yield ["--variants", "--real-sets", str(folder), "--results", str(tmp_path / "results"), "--seeds", "17", "18"]
    torch.set_num_threads(threads)
    logging.disable(level)


def figures_after(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    convergence.main(arguments)
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_rates_are_chosen_without_the_test(
    benchmark: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Job] = []
    ids = {part: [{one.id for one in rows} for rows in split_set(read_set(tmp_path / "scenes")[0], part)]
           for part in ("test", "choice")}  # fmt: skip

    def train(job: Job, train: list[Sample], held_out: list[Sample], *_: Any) -> dict[str, Any]:
        assert [{one.id for one in rows} for rows in (train, held_out)] == ids[job.part]
        trained.append(job)
        best = 2.5 if job.task == "boxes" else 0.4
        ap50 = (0.6 if job.rate == best else 0.5) + (0.1 if job.model == "fcos" else 0) + job.seed / 1000
        return {"ap50": ap50, "ap": 0.2, "ap_small": None, "cpu_s": job.settings["cpu_seconds"], "steps": 3}

    monkeypatch.setattr(compare_real, "train_ours", train)
    monkeypatch.setattr(compare_real, "train_and_judge", train)
    default, _ = figures_after([*benchmark, "--real-models", "ours", "fcos"], capsys)
    assert default["rates"] == "default" and default["real"]["scenes"]["boxes"]["ours"]["rate"] == 1
    assert [(job.part, job.rate) for job in trained] == [("test", 1)] * 8
    trained.clear()
    figures, _ = figures_after([*benchmark, "--real-models", "ours", "fcos", "--choose-rates"], capsys)
    assert figures["rates"] == "chosen"
    choices, tests = trained[:12], trained[12:]
    assert {(job.part, job.seed, job.settings["cpu_seconds"]) for job in choices} == {("choice", 0, 100)}
    assert {(job.part, job.settings["cpu_seconds"]) for job in tests} == {("test", 300)}
    assert {(job.task, job.rate) for job in tests} == {("boxes", 2.5), ("captions", 0.4)}
    entry = figures["real"]["scenes"]["boxes"]
    assert entry["ours"]["ap50"] == pytest.approx([0.6175, 0.617, 0.618])
    assert entry["peer"]["name"] == "fcos" and entry["peer"]["ap50"] == pytest.approx([0.7175, 0.717, 0.718])
    trained.clear()
    again, _ = figures_after([*benchmark, "--real-models", "ours", "fcos"], capsys)
    assert (again["real"], trained) == (figures["real"], [])


def test_variants_and_steps_of_ours(
    benchmark: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Job] = []

    def train(job: Job, *_: Any) -> dict[str, Any]:
        trained.append(job)
        ap50 = 0.4 if job.model == "fcos" else 0.9 if job.rate == 2.5 else 0.5
        return {"ap50": ap50, "ap": 0.2, "ap_small": None, "cpu_s": 9.0, "steps": 3}

    monkeypatch.setattr(compare_real, "train_ours", train)
    monkeypatch.setattr(compare_real, "train_and_judge", train)
    few = [*benchmark, "--real-tasks", "boxes", "--real-models", "ours", "fcos", "--choose-rates"]
    figures, _ = figures_after([*few, "--real-variants", "no denoising"], capsys)
    assert Counter((job.part, job.model) for job in trained) == {
        ("choice", "ours"): 3, ("choice", "fcos"): 3, ("test", "ours"): 2, ("test", "fcos"): 2,
        ("test", "ours, no denoising"): 2,
    }  # fmt: skip
    assert {(job.model, job.rate) for job in trained if job.part == "test"} == {
        ("ours", 2.5), ("ours, no denoising", 2.5), ("fcos", 1.0)
    }  # fmt: skip
    changed = [job.settings.get("changes") for job in trained if job.part == "test" and job.model != "fcos"]
    assert changed.count({"detection_head.num_denoising_groups": 0}) == 2 and changed.count(None) == 2
    entry = figures["real"]["scenes"]["boxes"]
    assert entry.keys() == {"ours", "ours, no denoising", "fcos", "peer", "cpu_s"}
    assert entry["peer"]["name"] == "fcos", "a variant of ours is not a peer"
    trained.clear()
    steps = [*benchmark, "--real-tasks", "boxes", "--real-models", "ours", "--real-steps", "7"]
    figures_after(steps, capsys)
    assert [job.settings["steps"] for job in trained] == [7, 7], "not found as a job of that CPU time"
    with pytest.raises(SystemExit):
        convergence.main([*steps, "--real-models", "ours", "fcos"])
    assert "add --real-models ours" in capsys.readouterr().err


def test_a_killed_job_leaves_nothing(benchmark: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(job: Job, *arguments: Any) -> dict[str, Any]:
        if job.seed == 18:
            raise KeyboardInterrupt
        return {"ap50": 0.5, "ap": 0.2, "ap_small": None, "cpu_s": 1.0, "steps": 3}

    monkeypatch.setattr(compare_real, "train_ours", train)
    with pytest.raises(KeyboardInterrupt):
        convergence.main([*benchmark, "--real-models", "ours", "--real-tasks", "boxes"])
    assert [path.name.split("-")[3] for path in (tmp_path / "results").iterdir()] == ["17"]
    assert list((tmp_path / "bench").iterdir()) == []


@pytest.mark.slow
def test_everybody_on_a_small_set(
    benchmark: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On parts of images of two sizes, a crowd, an empty image: trained, printed again, and not trained again."""
    monkeypatch.setattr(our_head, "PROBE_STEPS", 3)
    large = str(write_set(tmp_path / "large" / "scenes", around=5))
    few = [*benchmark[:-1], "--cpu-seconds", "0.1", "--augment", "parts", "--real-sets", large]
    figures, out = figures_after([*few, "--real-tasks", "captions"], capsys)
    assert "scenes: 1 x box left out: zero-area box" in out
    entry = figures["real"]["scenes"]["captions"]
    assert entry.keys() == {"ours", *PEERS, "peer", "cpu_s"}
    for model in ("ours", *PEERS):
        assert 0 <= entry[model]["ap50"][0] <= 1
        assert entry[model]["cpu_s"][0] > 0
    assert entry["peer"] == {"name": entry["peer"]["name"], **entry[entry["peer"]["name"]]}

    def no_training(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(compare_real, "train_model", no_training)
    for options in (["--real-tasks", "captions"], ["--real-tasks", "captions", "boxes", "--from-results"]):
        again, out = figures_after([*few, *options], capsys)
        assert again["real"] == figures["real"]
    assert "scenes, boxes, ours, seed 17: no result" in out


@pytest.mark.shared_data
def test_real_sets_have_their_budget(shared_data: Path) -> None:
    budgets = {name: pixel_budget(split_set(read_set(shared_data / name)[0], "test")[0])
               for name in ("chess_train", "wagon_train")}  # fmt: skip
    assert budgets == {"chess_train": 149_744, "wagon_train": 414_736}


def test_a_changed_set_is_another(tmp_path: Path) -> None:
    one, other = fingerprint(write_set(tmp_path / "a")), fingerprint(write_set(tmp_path / "b"))
    assert one == other
    (tmp_path / "b" / "images" / "3.png").write_bytes((tmp_path / "b" / "images" / "3.png").read_bytes() + b" ")
    assert fingerprint(tmp_path / "b") != one
