"""`recipe.images`."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from recipe.images import displayed_size, is_plain_jpeg, open_image

WIDTH, HEIGHT = 31, 20


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def marked_picture() -> Image.Image:
    """White, with a black block in the upper left corner."""
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    pixels[:8, :8] = 0
    return Image.fromarray(pixels)


# where EXIF says the stored upper left corner is displayed
CORNERS = {1: (2, 2), 2: (-3, 2), 3: (-3, -3), 4: (2, -3), 5: (2, 2), 6: (-3, 2), 7: (-3, -3), 8: (2, -3)}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(file_format: str, orientation: int):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(marked_picture(), file_format, exif=exif)
    image = open_image(data)
    turned = orientation >= 5
    assert image.size == displayed_size(data) == ((HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT))
    x, y = CORNERS[orientation]
    corner = image.getpixel((x % image.width, y % image.height))
    assert isinstance(corner, tuple)
    assert max(corner) < 60


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_keeps_its_shades(file_format: str):
    values = np.asarray([[0, 256, 32768, 65535]], dtype=np.uint16)
    image = open_image(encoded(Image.fromarray(values), file_format))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_transparency_lies_over_white():
    palette = Image.new("P", (4, 4))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 1)
    image = open_image(encoded(palette, "PNG", transparency=0))
    assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == ((0, 255, 0), (255, 255, 255))
    half = open_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG"))
    assert half.getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str):
    file_format = "TIFF" if mode == "CMYK" else "PNG"
    image = open_image(encoded(marked_picture().convert(mode), file_format))
    assert image.mode == "RGB"
    assert (image.getpixel((2, 2)), image.getpixel((20, 15))) == ((0, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(marked_picture(), "JPEG")[:300]])
def test_what_is_no_picture_is_refused(data: bytes):
    with pytest.raises(ValueError, match=f"of {len(data)} bytes"):
        open_image(data)


def test_floats_are_refused():
    with pytest.raises(ValueError, match="floats"):
        open_image(encoded(Image.new("F", (2, 2)), "TIFF"))


def test_a_plain_jpeg_has_three_colours_and_stands_upright():
    assert is_plain_jpeg(encoded(marked_picture(), "JPEG"))
    assert not is_plain_jpeg(encoded(marked_picture(), "PNG"))
    assert not any(is_plain_jpeg(encoded(marked_picture().convert(mode), "JPEG")) for mode in ("L", "CMYK"))
    assert not is_plain_jpeg(b"") and not is_plain_jpeg(b"no picture")
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x112] = orientation
        assert is_plain_jpeg(encoded(marked_picture(), "JPEG", exif=exif)) == (orientation == 1)
