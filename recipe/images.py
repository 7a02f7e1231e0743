"""Decode an image file into the RGB pixels a person would see, whatever its format."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Image.init()
# Read by conversion and prediction alike. Pillow's other decoders stay out: that of EPS runs another program.
# TGA is last, because a TGA file is known by no mark at its start. Pillow before 11.3 has no AVIF.
_WANTED = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "TGA")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
SUFFIXES = tuple(sorted(suffix for suffix, name in Image.EXTENSION.items() if name in (*FORMATS, "MPO")))
MAX_ASPECT_RATIO = 200  # of Qwen's vision towers
_DEEP_GRAY_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_TURNS = {  # EXIF orientation → what shows the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)


def open_image(data: bytes) -> Image.Image:
    """Decode an image file to RGB in its displayed orientation.

    Applies the EXIF orientation, composites transparency over white and scales 16-bit grayscale to 8 bits.

    Raises:
        ValueError: The bytes are not an image, are truncated, or hold values without a known white point.
    """
    with _opened(data) as image:
        return displayed(image)


def displayed(image: Image.Image) -> Image.Image:
    """Return an image of Pillow as `open_image` shows its file; raise what Pillow raises, or ValueError."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    # Not `ImageOps.exif_transpose`: it also writes the EXIF tags back, which fails for some of them.
    image = image if turn is None else image.transpose(turn)
    if image.mode in _DEEP_GRAY_MODES:  # `convert` would cut 16-bit gray off at 255: 65535 becomes white instead
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"gray values {values.min()} to {values.max()} do not fit 16 bits: store 8 or 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("the image holds floats, whose black and white are unknown: store 8 or 16 bits")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


def uncompressed(image: Image.Image) -> bytes:
    """Return an RGB image as a file that costs nothing to write and read."""
    file = BytesIO()
    image.save(file, "PPM")
    return file.getvalue()


def displayed_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels of what `open_image` returns, from the file's header if the format allows.

    Raises:
        ValueError: The bytes are not an image.
    """
    with _opened(data) as stored:
        return _displayed_size(stored)


def check_image(data: bytes) -> tuple[int, int]:
    """Decode every byte of an image file, so that no truncated one passes; return `displayed_size`.

    The pixels of a JPEG are not needed: decoding it at an eighth of its size, in gray, takes half the time.

    Raises:
        ValueError: It cannot be decoded.
    """
    with _opened(data) as image:
        if image.format == "JPEG":
            size = _displayed_size(image)
            image.draft("L", (1, 1))
            image.load()
            return size
    return open_image(data).size


def is_plain_jpeg(data: bytes) -> bool:
    """Return whether this is an upright three-colour JPEG, of which any libjpeg gives `open_image`'s pixels."""
    try:
        with _opened(data) as stored:
            return stored.format == "JPEG" and stored.mode == "RGB" and _orientation(stored) not in _TURNS
    except ValueError:
        return False


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Yield an image file before it is decoded; inside, all that a decoder raises becomes a ValueError."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            yield image
    except Exception as error:  # decoders raise anything, such as RuntimeError for AVIF
        raise ValueError(f"cannot decode an image of {len(data)} bytes: {_describe(error)}") from error


def _displayed_size(stored: Image.Image) -> tuple[int, int]:
    width, height = stored.size
    is_turned = _orientation(stored) in _SWAPS_SIDES and stored.format != "TIFF"  # TIFF's size is the displayed one
    return (height, width) if is_turned else (width, height)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, as viewers do, if the tags cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken tags raise anything, and the pixels are good
        return 1


def _describe(error: Exception) -> str:
    """Return the reason and what to do; the same for the same bytes: one of PIL's errors names an address in memory."""
    text = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        return f"no known image format ({', '.join(FORMATS)}): save it as PNG or JPEG"
    if isinstance(error, Image.DecompressionBombError):
        return f"{text} Tile the image, or make it smaller"
    if "too large for PngImagePlugin" in text or "text chunks" in text or text == "Decompressed data too large":
        return f"a text or colour profile of the PNG is above Pillow's limit ({text}): save the image without metadata"
    return text
