"""Find the images that a command line names, match them to entries of data sets, and read annotated folders."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from convert.annotated import jsonl_files, read_jsonl
from recipe.images import SUFFIXES
from recipe.records import INDEX_FILE
from recipe.schema import Sample


def find_images(arguments: Iterable[str], left_out: Path) -> tuple[list[Path], Counter[str]]:
    """Return the images that files, folders and globs name, in order, each once, and counts of other files by suffix.

    A named file is always taken: if it does not exist, reading it reports that. A folder gives all files below it with
    an image suffix, by name, except hidden ones. `**` in a glob matches any folders.

    Args:
        arguments: Files, folders and globs.
        left_out: Folder that is not searched unless it is named itself, since the drawings go there.

    Raises:
        ValueError: A folder or a glob holds no image, or a folder cannot be read.
    """
    found: dict[Path, Path] = {}
    others = Counter[str]()
    for argument in arguments:
        paths = list(_expand(argument, left_out.resolve(), others))
        if not paths:
            raise ValueError(f"{argument} holds no image: give files, globs, or folders of {' '.join(SUFFIXES)}")
        for path in paths:
            found.setdefault(path.resolve(), path)
    return list(found.values()), others


def _expand(argument: str, left_out: Path, others: Counter[str]) -> Iterator[Path]:
    path = Path(argument)
    if path.is_dir():
        yield from _below(path, left_out, others)
    elif path.exists() or not glob.has_magic(argument):
        yield path
    else:
        for name in sorted(glob.glob(argument, recursive=True)):
            if os.path.isfile(name) and left_out not in Path(name).resolve().parents:
                yield Path(name)


def _below(folder: Path, left_out: Path, others: Counter[str]) -> Iterator[Path]:
    """Yield the images below a folder, through links too, each folder once; count other files in `others`."""
    seen = {left_out} - {folder.resolve()}

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(Path(root).resolve())
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(root, name).resolve() not in seen
        )
        for name in sorted(name for name in names if not name.startswith(".")):
            if name.lower().endswith(SUFFIXES):
                yield Path(root, name)
            else:
                others[Path(name).suffix.lower()] += 1


def unique_names(paths: Sequence[Path], out: Path) -> list[str]:
    """Return a name per image, its stem if free: no drawing `{out}/{name}.png` overwrites another or an input."""
    taken = {str(path.resolve()).casefold() for path in paths}
    names = []
    for path in paths:
        name, number = path.stem, 1
        while (drawing := str((out / f"{name}.png").resolve()).casefold()) in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(drawing)
        names.append(name)
    return names


def names_by_file(names: Iterable[str]) -> dict[str, list[str]]:
    """Return relative paths, as data sets write them, by their last part, which `entry_of` searches."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_on_this_system(name).name, []).append(name)
    return found


def entry_of(path: Path, names: Mapping[str, Sequence[str]]) -> str | None:
    """Return the entry of `names` (from `names_by_file`) that names the file, or None; raise ValueError if several do.

    The folders of a name must be the last ones of the path, as given or with its links resolved: `train/x.png` does
    not name `val/x.png`.
    """
    places = (path.absolute().parts, path.resolve().parts)
    split = [(name, _on_this_system(name).parts) for name in names.get(path.name, ())]
    alike = [name for name, parts in split if any(place[-len(parts) :] == parts for place in places)]
    if len(alike) > 1:
        raise ValueError(f"{path} can be any of {alike[:3]} of the data set: give files of different names")
    return alike[0] if alike else None


def _on_this_system(name: str) -> Path:
    return Path(name.replace("\\", "/"))  # data sets are written on Windows too


def entries_of(paths: Sequence[Path], names: Iterable[str], source: str) -> list[str]:
    """Return the entry of each file; raise ValueError if a file has none, or shares it with another.

    Args:
        paths: The files.
        names: Relative paths, as data sets write them.
        source: Of the names, for messages.
    """
    by_file = names_by_file(names)
    entries: list[str] = []
    for path in paths:
        name = entry_of(path, by_file)
        if name is None:
            raise ValueError(f"{path} is not among the images of {source}: leave one of them out")
        entries.append(name)
    refuse_shared(zip(map(str, paths), entries, strict=True))
    return entries


def refuse_shared(claims: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError if two files have the same entry of a data set; `claims`: (file, entry), repeated or not."""
    files: dict[str, str] = {}
    for file, name in claims:
        if files.setdefault(name, file) != file:
            raise ValueError(
                f"{files[name]} and {file} can both be {name} of the data set: predict the images of one folder at a "
                "time, or give a data set whose names have their folders"
            )


def read_annotated_folder(folder: Path) -> list[Sample]:
    """Return the annotated images of a folder: MDS shards, or one file of JSON lines and the images it names.

    Raises:
        ValueError: It is neither, or one of its images cannot be used or is not annotated.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one of MDS shards, or of images and their annotations")
    if (folder / INDEX_FILE).is_file():
        from recipe.upstream.storage import read_mds  # imports Composer, which takes seconds

        samples = list(read_mds(folder))
    else:
        files = jsonl_files(folder)
        if len(files) != 1:
            splits = sorted(str(index.parent) for index in folder.glob(f"*/{INDEX_FILE}"))
            form = "give a folder of MDS shards, or of images and their annotations as convert/jsonl.py reads them"
            remedy = f"give one of its splits, such as {splits[0]}" if splits else form
            raise ValueError(f"{folder} holds neither {INDEX_FILE} nor one file *.jsonl ({len(files)} found): {remedy}")
        samples = read_jsonl(files[0])
    if not samples:
        raise ValueError(f"{folder} holds no annotated image")
    unusable = [sample.id for sample in samples if sample.objects is None or not sample.image]
    if unusable:
        raise ValueError(f"{folder} holds samples that are not annotated images: {unusable[:5]}")
    return samples
