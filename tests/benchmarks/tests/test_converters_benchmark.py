"""Check `tests/benchmarks/converters.py`: every format holds the same boxes, and it ends with its line of JSON."""

import json

import pytest

from converters import FORMATS, Drawn, main

pytest.importorskip("pyarrow")


def test_every_format_is_read_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--num-images", "7", "--num-boxes", "60", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["converters.py", *sizes])
    main()
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])
    assert list(rows) == list(FORMATS) == [line.split()[0] for line in lines[1:-1]]
    for name, row in rows.items():
        assert (row["boxes"], row["rejected"], row["records"]) == (60, 0, 60 if name == "refcoco" else 7), name
        assert row["mb_per_s"] > 0 and row["boxes_times_coco"] > 0


def test_the_drawn_set_is_the_same_every_time() -> None:
    one, other = (list(Drawn(5, 33).by_image()) for _ in range(2))
    assert one == other
    assert sum(map(len, one)) == 33
    assert [number for rows in one for number, *_ in rows] == list(range(1, 34))
