"""The documents hold: sizes, links, commands, keys and words."""

import fnmatch
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import composer
import pytest

from recipe.config import RecipeConfig
from recipe.configure import ConfigError, load_config
from recipe.rules import check_config

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [
    README,
    *(ROOT / name for name in ("convert/README.md", "recipe/README.md", "yamls/README.md")),
    ROOT / "tests/benchmarks/RESULTS.md",
]
YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))
MOST_BYTES = 14 * 1024

# Files whose words are checked; tiny.py holds the sentences that its tokenizer is trained on.
WORDED = (
    "README.md",
    "*/README.md",
    "tests/benchmarks/RESULTS.md",
    "yamls/*.yaml",
    "Makefile",
    "recipe/**/*.py",
    "convert/**/*.py",
)
# By style.md, "Words": {pattern: what to write}. Names joined by `_` are words too.
WORDS = {
    r"pictures?|pictured": "image; drawing",
    r"anew|newly": "again",
    r"told|tells?|telling": "report, log, return, say",
    r"mend(s|ed|ing)?": "fix",
    r"for ever": "indefinitely",
    r"so many": "N",
    r"(go(es)?|going|went) on": "continue, resume",
    r"lies|lay|lain": "is",
    r"stands?": "is",
    r"dealt|deals? out": "assigned",
    r"beside|besides": "next to, with",
    r"hand(s|ed)? over": "pass",
    r"(?<!there )is no(?! longer)": "is not a",
    r"passed over": "skipped",
    r"lest|whence|wherein": "so that ... not",
}


def document_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a document as (language, content)."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield match[1], match[2]


def without_code(text: str) -> str:
    """A document's prose, with its lines kept: no fenced blocks, code spans or targets of links."""
    text = re.sub(r"^```.*?^```$", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]+`", "`code`", text)
    return re.sub(r"\]\([^)\s]+\)", "]", text)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def comment_lines(path: Path) -> str:
    """The comments of a yaml that fill a line, without their marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def commands(path: Path) -> list[list[str]]:
    """The commands of a document's unnamed blocks and spans, or of a yaml's header, as arguments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        sources = [comment_lines(path)]
    else:
        spans = re.findall(r"`(python [^`\n]+ --[^`\n]+)`", text)
        sources = [*(code for kind, code in blocks(text) if not kind), *spans]
    found = []
    for source in sources:
        for line in re.sub(r"\\\n\s*", "", source).splitlines():
            command = re.search(r"^(?:.*:  )?((?:python|composer) (?!tests/benchmarks).*)", line)
            if command is not None:
                # As the shell would: an arithmetic value, then what a reader chooses.
                typed = re.sub(r"\$\(\(.*?\)\)", "8", command[1]).replace("NODE_RANK", "1")
                typed = re.sub(r"\[(--.*?)\]", r"\1", typed)
                typed = re.sub(r"(--num-samples|--seed) [NS]\b", r"\1 1", typed)
                found.append(shlex.split(typed, comments=True))
    return found


# Runs every command up to its parsed arguments, in one process. What a command does after that is not run.
CHILD = """
import argparse, json, runpy, sys

class Parsed(BaseException):
    pass

def stop(name):
    parse = getattr(argparse.ArgumentParser, name)
    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed
    return parse_and_stop

for name in ("parse_args", "parse_intermixed_args", "parse_known_intermixed_args"):
    setattr(argparse.ArgumentParser, name, stop(name))
failed = []
for program, *arguments in json.loads(sys.argv[1]):
    if program == "composer":
        program, run = "composer.cli.launcher", lambda: runpy.run_module("composer.cli.launcher", run_name="__main__")
    elif arguments[0] == "-m":
        program, arguments = arguments[1], arguments[2:]
        run = lambda: runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        program, arguments = arguments[0], arguments[1:]
        run = lambda: runpy.run_path(program, run_name="__main__")
    sys.argv = [program, *arguments]
    try:
        run()
        failed.append([program, "has parsed nothing"])
    except Parsed:
        pass
    except SystemExit as error:
        failed.append([program, *arguments, f"exits with {error.code}"])
print(json.dumps(failed))
"""


def overrides_of(command: list[str]) -> tuple[str, list[str]] | None:
    """The yaml of a command and its `key.sub=value` arguments, if it has one."""
    for position, argument in enumerate(command):
        if argument.endswith(".yaml") and argument.startswith("yamls/"):
            return argument, [text for text in command[position + 1 :] if re.match(r"[\w.]+=", text)]
    return None


def yaml_keys(text: str) -> set[str]:
    """The dotted keys of a text, such as `optimizer.lr_*`; not files such as `loss.py`."""
    sections = "|".join(field.name for field in fields(RecipeConfig))
    found = re.findall(rf"(?<![\w./])(?:{sections})(?:\.[a-z_]+\*?)+(?![\w/(])", text)
    return {key for key in found if not re.search(r"\.(py|md|yaml|jsonl?|html|safetensors|gz)$", key)}


def is_key(key: str) -> bool:
    """Whether a dotted key, whose last part may end in `*`, exists. Names in another library's keywords are free."""
    section: Any = RecipeConfig
    for position, name in enumerate(key.split(".")):
        section = next((kind for kind in (section, *get_args(section)) if is_dataclass(kind)), section)
        if not is_dataclass(section):
            parts = key.split(".")
            return parts[0] != "trainer" or position > 1 or name in inspect.signature(composer.Trainer).parameters
        kinds = {field.name: field.type for field in fields(section)}
        names = fnmatch.filter(kinds, name)
        if not names:
            return False
        section = kinds[names[0]]
    return True


def found_words(text: str) -> list[str]:
    """The words that style.md does not want, with their lines."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for pattern, instead in WORDS.items():
            for match in re.finditer(rf"(?<![^\W_])(?:{pattern})(?![^\W_])", line, re.IGNORECASE):
                found.append(f"{number}: {match[0]!r}: write {instead}")
    return found


def test_the_readme_is_short() -> None:
    assert README.stat().st_size <= MOST_BYTES


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for target in targets:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{path.name}: no heading for {target}"


@pytest.mark.parametrize("path", [*DOCUMENTS, *YAMLS], ids=document_id)
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = re.findall(r"(?<![\w./])(?:recipe|convert|tests|yamls)/[\w/]+\.(?:py|yaml|md|png)\b", text)
    missing = {name for name in names if not (ROOT / name).exists()}
    assert not missing, f"{path.name} names {sorted(missing)}"


def test_the_settings_that_freeze_the_backbone_are_accepted() -> None:
    (bullet,) = re.findall(
        r"^- \*\*Freeze a part\.\*\*.*?(?=^- )", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    frozen, cached = re.findall(r"[\w.]+=\w+", bullet)
    check_config(load_config(str(ROOT / "yamls/joint.yaml"), [frozen]))
    check_config(load_config(str(ROOT / "yamls/head.yaml"), [cached]))
    trunk = [f"optimizer.lr_{group}=0" for group in ("vision", "merger", "llm")]
    with pytest.raises(ConfigError, match="freezes adapter, detection at the start"):
        check_config(load_config(str(ROOT / "yamls/joint.yaml"), trunk))


def test_the_shape_of_the_commands() -> None:
    """The extraction finds what a reader would type, so the tests below test something."""
    found = [" ".join(command) for command in commands(README)]
    assert "python -m convert.coco --annotations val.json --images images --out data/train_set --split val" in found
    assert sum("--world_size 64" in command and command.endswith("joint_fsdp.yaml") for command in found) == 1
    assert any(command.startswith("python -m recipe.gallery --predictions") for command in found)
    assert len(found) >= 12
    assert len(commands(ROOT / "convert/README.md")) == 13 + 3 + 3 + 1
    assert all(len(commands(path)) == 1 for path in YAMLS if path.name != "overfit.yaml")


def test_commands_parse() -> None:
    """Flags and subcommands exist, by the programs' own parsers."""
    parsed = []
    for path in [*DOCUMENTS, *YAMLS]:
        for command in commands(path):
            yaml = overrides_of(command)
            if yaml is not None:
                load_config(str(ROOT / yaml[0]), yaml[1])
            script = next((argument for argument in command if argument.endswith(".py")), None)
            assert script is None or (ROOT / script).is_file(), f"{path.name}: {script} does not exist"
            parsed.append(command)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(parsed)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [], run.stderr


@pytest.mark.parametrize("path", [*DOCUMENTS, *YAMLS], ids=document_id)
def test_benchmarks_know_their_options(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for script, rest in re.findall(r"python (tests/benchmarks/\w+\.py)([^`\n|]*)", text):
        source = (ROOT / script).read_text(encoding="utf-8")
        unknown = [option for option in re.findall(r"--[a-z-]+", rest) if f'"{option}"' not in source]
        assert not unknown, f"{path.name}: {script} does not know {unknown}"


@pytest.mark.parametrize("path", [*DOCUMENTS, *YAMLS], ids=document_id)
def test_keys_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    unknown = sorted(key for key in yaml_keys(text) if not is_key(key))
    assert not unknown, f"{path.name} names keys that recipe/config.py does not have: {unknown}"


def test_what_a_key_is() -> None:
    assert yaml_keys("`optimizer.lr_*`, losses/detection.py, recipe.config, image.py, `a.loss.x`") == {"optimizer.lr_*"}
    known = (
        "optimizer.lr_*",
        "train_loader.packing.max_tokens",
        "ema.half_life",
        "trainer.max_duration",
        "teachers.stream",
    )
    assert all(is_key(key) for key in known)
    unknown = (
        "optimizer.rate_*",
        "optimizer.lr_visoin",
        "ema.halflife",
        "trainer.max_epochs",
        "train_loader.packing.no",
    )
    assert not any(is_key(key) for key in unknown)


@pytest.mark.parametrize(
    "path",
    sorted({path for glob in WORDED for path in ROOT.glob(glob)} - {ROOT / "recipe" / "tiny.py"}),
    ids=document_id,
)
def test_plain_words(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = found_words(without_code(text) if path.suffix == ".md" else text)
    assert not found, f"{document_id(path)}: " + "; ".join(found)


def test_words_are_found() -> None:
    assert len(found_words("A picture is told anew.\nIt lies beside find_pictures, for ever: so many go on.")) == 9
    assert found_words("There is no padding; it is no longer so; the image stays in place, standard, bestand.") == []
