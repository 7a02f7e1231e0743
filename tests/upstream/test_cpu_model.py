"""Composer gets the processor's name from a file, not from a process that sleeps a second."""

from pathlib import Path

import pytest
from composer.utils import collect_env, get_composer_env_dict

from recipe.upstream import cpu_model

ORIGINAL = collect_env.get_cpu_model
NAMES = cpu_model.CPUINFO.read_text() if cpu_model.CPUINFO.is_file() else ""


@pytest.fixture
def composers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_env, "get_cpu_model", ORIGINAL)  # also restores it after the test


@pytest.mark.usefixtures("composers_own")
def test_the_name_is_that_of_the_first_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> None:
        raise AssertionError("py-cpuinfo starts a process")

    monkeypatch.setattr("cpuinfo.cpuinfo.get_cpu_info_json", started)
    monkeypatch.setattr(cpu_model, "CPUINFO", tmp_path / "cpuinfo")
    cores = "".join(f"processor\t: {core}\nmodel name\t: A: chip {core}\n\n" for core in range(2))
    cpu_model.CPUINFO.write_text(cores)
    assert cpu_model.read_cpu_model()
    assert get_composer_env_dict()["cpu_model"] == "A: chip 0"


@pytest.mark.usefixtures("composers_own")
@pytest.mark.parametrize("text", [None, "processor\t: 0\nCPU part\t: 0xd40\n"])
def test_without_a_name_composer_asks_as_before(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_model, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        cpu_model.CPUINFO.write_text(text)
    assert not cpu_model.read_cpu_model()
    assert collect_env.get_cpu_model is ORIGINAL


@pytest.mark.usefixtures("composers_own")
@pytest.mark.skipif("model name" not in NAMES, reason="this system does not have the name in a file")
def test_the_name_is_the_one_that_py_cpuinfo_gives() -> None:
    assert cpu_model.read_cpu_model()
    assert collect_env.get_cpu_model() == ORIGINAL()


@pytest.mark.skipif("model name" not in NAMES, reason="this system does not have the name in a file")
@pytest.mark.usefixtures("trained_checkpoint")
def test_a_run_reads_the_file() -> None:
    """The fixture trained in this process."""
    assert collect_env.get_cpu_model is not ORIGINAL
