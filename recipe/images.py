"""Decode an image file into the RGB pixels a person would see, whatever its format."""

from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

_DEEP_GRAY_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_TURNED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF values that swap width and height
_DECODE_ERRORS = (OSError, SyntaxError, EOFError, Image.DecompressionBombError)


def open_image(data: bytes) -> Image.Image:
    """Decode an image file to RGB in its displayed orientation.

    Applies the EXIF orientation, composites transparency over white and scales 16-bit grayscale to 8 bits.

    Raises:
        ValueError: The bytes are not an image, are truncated, or hold values without a known white point.
    """
    try:
        with Image.open(BytesIO(data)) as stored:
            stored.load()
            image = ImageOps.exif_transpose(stored)
    except _DECODE_ERRORS as error:
        raise ValueError(f"cannot decode an image of {len(data)} bytes: {describe_decode_error(error)}") from error
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


def displayed_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels of what `open_image` returns, from the file's header if the format allows.

    Raises:
        ValueError: The bytes are not an image.
    """
    try:
        with Image.open(BytesIO(data)) as stored:
            width, height = stored.size
            orientation = stored.getexif().get(ExifTags.Base.Orientation)
            already_turned = stored.format == "TIFF"
    except _DECODE_ERRORS as error:
        message = f"cannot read the size of an image of {len(data)} bytes: {describe_decode_error(error)}"
        raise ValueError(message) from error
    return (height, width) if orientation in _TURNED_ORIENTATIONS and not already_turned else (width, height)


def is_plain_jpeg(data: bytes) -> bool:
    """Return whether this is an upright three-colour JPEG, of which any libjpeg gives `open_image`'s pixels."""
    try:
        with Image.open(BytesIO(data)) as stored:
            plain = stored.format == "JPEG" and stored.mode == "RGB"
            return plain and stored.getexif().get(ExifTags.Base.Orientation) not in range(2, 9)
    except _DECODE_ERRORS:
        return False


def describe_decode_error(error: Exception) -> str:
    """Return the decoder's message, the same for the same bytes: one of PIL's errors names an address in memory."""
    return "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
