"""`recipe.prediction.files`: which images a command line names, and what is written about each."""

from pathlib import Path

import pytest

from recipe.prediction.files import entry_of, find_images, names_by_file, unique_names


def test_files_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("b.jpg", "a.PNG", "notes.txt", ".hidden.png", "deep/er/c.webp", "deep/out/drawn.png", "[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def found(*arguments: str) -> list[str]:
        return [path.as_posix() for path in find_images(arguments, left_out=Path("deep/out"))[0]]

    assert found(".") == ["[1].png", "a.PNG", "b.jpg", "deep/er/c.webp"]
    assert found("b.jpg", ".", "b.jpg")[:2] == ["b.jpg", "[1].png"]
    assert found("*.jpg") == ["b.jpg"]
    assert found("**/*.webp", "deep") == ["deep/er/c.webp"]
    assert found("[1].png", "notes.txt", "gone.png") == ["[1].png", "notes.txt", "gone.png"]
    assert found("deep/out") == ["deep/out/drawn.png"]  # named, so wanted
    assert found("**/*.png") == ["[1].png"]
    (tmp_path / "empty").mkdir()
    for nothing in ("*.gif", "empty"):
        with pytest.raises(ValueError, match="holds no image"):
            found(nothing)


def test_what_is_left_out_of_folders_is_counted(tmp_path: Path):
    for name in ("a.png", "b.heic", "deep/c.HEIC", "deep/notes.txt", "deep/scan", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths, others = find_images([str(tmp_path), str(tmp_path / "a.png")], left_out=tmp_path / "out")
    assert paths == [tmp_path / "a.png"]
    assert others == {".heic": 2, ".txt": 1, "": 1}


def test_links_to_folders_are_followed_once(tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.png").touch()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "round").symlink_to(tmp_path / "here")
    paths, _ = find_images([str(tmp_path / "here")], left_out=tmp_path / "out")
    assert paths == [tmp_path / "here" / "link" / "a.png"]


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot read the folder .*: Permission denied"):
        find_images([str(tmp_path)], left_out=tmp_path / "out")


def test_an_entry_of_several_files_of_one_name():
    names = names_by_file(["train/x.png", "val/x.png", "y.png"])
    assert entry_of(Path("data/val/x.png"), names) == "val/x.png"
    assert entry_of(Path("elsewhere/y.png"), names) == "y.png"
    assert entry_of(Path("z.png"), names) is None
    assert entry_of(Path("val/x.png"), names_by_file(["train/x.png"])) is None
    assert entry_of(Path("data/val/x.png"), names_by_file(["train\\x.png", "val\\x.png"])) == "val\\x.png"
    with pytest.raises(ValueError, match="can be any of"):
        entry_of(Path("elsewhere/x.png"), names_by_file(["x.png", "elsewhere/x.png"]))


def test_an_entry_of_a_folder_that_is_a_link(tmp_path: Path):
    """Both its names are the folder's."""
    (tmp_path / "train").mkdir()
    (tmp_path / "today").symlink_to("train")
    for name in ("train/x.png", "today/x.png"):
        assert entry_of(tmp_path / "today" / "x.png", names_by_file([name])) == name
    assert entry_of(tmp_path / "train" / "x.png", names_by_file(["today/x.png"])) is None


def test_names_are_kept_apart(tmp_path: Path):
    paths = [tmp_path / name for name in ("a/x.png", "b/x.jpg", "b/X.png", "c/x-2.png", "d/x.tar.png")]
    assert unique_names(paths, tmp_path / "out") == ["x", "x-2", "X-3", "x-2-2", "x.tar"]
