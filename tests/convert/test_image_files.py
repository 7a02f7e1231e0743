"""Names and contents of image files: what conversion reads, as prediction does, and why it leaves the rest out."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture
from PIL import Image, PngImagePlugin

from convert.image_files import find_image, read_image
from convert.items import BadRecord
from recipe.images import FORMATS, SUFFIXES, check_image, displayed_size, is_plain_jpeg, open_image


def odd_exif(tag: int, kind: int) -> bytes:
    """Orientation 6 and one tag of a type that Pillow reads, but cannot write."""
    entries = struct.pack("<HHIHHHHII", 0x112, 3, 1, 6, 0, tag, kind, 1, 0xFFFFFFFF)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "sub" / "a.jpg").write_bytes(picture())
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "blob").write_bytes(picture())
    (images / "linked.jpg").symlink_to(tmp_path / "cache" / "blob")
    (images / "linked").symlink_to(tmp_path / "cache")
    (images / "lost.jpg").symlink_to(images / "annex" / "object")
    (tmp_path / "alias").symlink_to(images)
    return images


@pytest.mark.parametrize("name", ["sub/a.jpg", "sub\\a.jpg", ".\\sub\\a.jpg", "{root}/sub/a.jpg", "sub/../sub/a.jpg"])
def test_names_that_mean_a_file_below_the_root(root: Path, name: str) -> None:
    for folder in (root, root.parent / "alias"):
        found = find_image(str(folder), name.format(root=folder))
        assert found == str(root.resolve() / "sub" / "a.jpg")
    assert find_image(str(root.parent / "alias"), f"{root}/sub/a.jpg").endswith("images/sub/a.jpg")


def test_a_backslash_can_be_part_of_a_name(root: Path) -> None:
    (root / "sub\\a.jpg").write_bytes(picture((3, 3)))
    assert find_image(str(root), "sub\\a.jpg").endswith("sub\\a.jpg")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../cache/blob", "path leaves the image root: '../cache/blob'"),
        ("..\\cache\\blob", "path leaves the image root"),
        ("sub/../../cache/blob", "path leaves the image root"),
        ("{root}/../cache/blob", "absolute path: .* write it relative"),
        ("{root}-other/a.jpg", "absolute path"),
        ("D:\\set\\a.jpg", "absolute path: .* another machine"),
        ("\\\\server\\set\\a.jpg", "absolute path"),
        ("linked.jpg", "is a link to outside --images: 'linked.jpg': give --follow-links"),
        ("linked/blob", "is a link to outside --images"),
        ("lost.jpg", "missing file: .*lost.jpg', a link to .*annex/object', which is not there"),
        ("sub\\b.jpg", "missing file: .*sub/b.jpg"),
        ("a.jpg", "missing file: .*images/a.jpg'; --images .*/images/sub has it"),
        ("images/sub/a.jpg", "missing file: .*images/images/sub/a.jpg'; --images .*[^/]{9} has it"),
        ("\ud83d.jpg", r"text beyond Unicode: .*ud83d"),
    ],
)
def test_every_other_name_has_its_own_reason(root: Path, name: str, message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        find_image(str(root), name.format(root=root))


def test_links_are_followed_if_asked(root: Path) -> None:
    for name in ("linked.jpg", "linked/blob", str(root / "linked.jpg")):
        assert find_image(str(root), name, follow_links=True) == str((root.parent / "cache" / "blob").resolve())
    for name, message in (("../cache/blob", "leaves the image root"), ("lost.jpg", "which is not there")):
        with pytest.raises(BadRecord, match=message):
            find_image(str(root), name, follow_links=True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("tag", "tag_kind"), [(0x11A, 2), (0x128, 4), (0x132, 11), (0x100, 7)])
def test_tags_that_cannot_be_written_turn_no_good_image_down(kind: str, tag: int, tag_kind: int) -> None:
    data = picture(kind=kind, exif=odd_exif(tag, tag_kind))
    assert open_image(data).size == displayed_size(data) == check_image(data) == (10, 20)
    assert not is_plain_jpeg(data)


def test_tags_that_cannot_be_read_turn_nothing() -> None:
    data = picture(exif=odd_exif(0x11A, 2)[:10] + b"\xff" * 20)
    assert open_image(data).size == displayed_size(data) == check_image(data) == (20, 10)


SAVED = {"JPEG2000": "jp2", "TGA": "tga", "AVIF": "avif", "PPM": "ppm", "TIFF": "tiff", "WEBP": "webp", "GIF": "gif"}


@pytest.mark.parametrize("kind", FORMATS)
def test_convert_and_predict_read_the_same_formats(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(picture(kind=kind))
    data, width, height = read_image(str(path))
    assert (width, height) == (20, 10) == open_image(data).size == displayed_size(data)
    assert f".{SAVED.get(kind, kind.lower())}" in SUFFIXES


@pytest.mark.parametrize("kind", ["ICO", "PCX", "EPS"])
def test_other_formats_are_refused_by_both(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(kind=kind))
    with pytest.raises(BadRecord, match=r"unreadable image: a.png: .*no known image format.*PNG or JPEG"):
        read_image(str(path))
    with pytest.raises(ValueError, match="no known image format"):
        open_image(path.read_bytes())
    assert f".{kind.lower()}" not in SUFFIXES


@pytest.mark.parametrize("error", [RuntimeError("frame"), KeyError("tag"), MemoryError(), AttributeError("fp")])
def test_whatever_a_decoder_raises_belongs_to_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    path = tmp_path / "a.png"
    path.write_bytes(picture(kind="PNG"))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(BadRecord, match=r"unreadable image: a.png"):
        read_image(str(path))


def test_a_damaged_avif(tmp_path: Path) -> None:
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(noise, "AVIF")
    data = bytearray(noise.getvalue())
    data[-200:] = os.urandom(200)
    path = tmp_path / "a.avif"
    path.write_bytes(bytes(data[:-100]))
    with pytest.raises(BadRecord, match="unreadable image"):
        read_image(str(path))


def test_pillows_limits_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    for name, content in (("zTXt", b"Comment\0\0"), ("iCCP", b"profile\0\0"), ("iTXt", b"XML:com.adobe.xmp\0\1\0\0\0")):
        chunk = name.encode() + content + zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1))
        data = picture(kind="PNG")
        packed = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        path.write_bytes(data[:33] + packed + data[33:])
        with pytest.raises(BadRecord, match="save the image without metadata"):
            read_image(str(path))
    path.write_bytes(picture(kind="PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(BadRecord, match=r"200 pixels.* Tile the image"):
        read_image(str(path))


def test_images_that_no_vision_tower_takes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for size, is_good in (((200, 1), True), ((201, 1), False), ((2, 402), False)):
        path.write_bytes(picture(size, kind="PNG"))
        if is_good:
            assert read_image(str(path))[1:] == size
        else:
            with pytest.raises(BadRecord, match=f"over 200 times as long as wide: a.png is {size[0]}x{size[1]}"):
                read_image(str(path))
