"""One image → uint8 patches in Qwen2-VL order, normalised later on the device.

Bytes instead of float32 with a repeated frame are an eighth of the transfer. The numbers are the same:
`Qwen2VLImageProcessorFast` also resizes uint8 pixels and normalises afterwards.
"""

from typing import Any, cast

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg
from torchvision.transforms import InterpolationMode
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from recipe.config import ImageConfig
from recipe.data.augment import Drawn
from recipe.images import MAX_ASPECT_RATIO, is_plain_jpeg, open_image
from recipe.schema import ImageSpec


def image_spec(image_processor: Any, image_config: ImageConfig) -> ImageSpec:
    """Read a Hugging Face image processor, slow or fast; a pixel budget in `image_config` overrides its own."""
    size = image_processor.size or {}
    limits = {}
    for name, size_key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        candidates = (getattr(image_config, name), getattr(image_processor, name, None), size.get(size_key))
        limits[name] = next((int(value) for value in candidates if value is not None), None)
        if limits[name] is None:
            raise ValueError(f"the checkpoint's image processor has no {name}: set image.{name}")
    if limits["min_pixels"] > limits["max_pixels"]:
        raise ValueError(
            f"image.min_pixels {limits['min_pixels']} is above image.max_pixels {limits['max_pixels']}: set both"
        )
    return ImageSpec(
        patch_size=image_processor.patch_size,
        merge_size=image_processor.merge_size,
        image_mean=tuple(image_processor.image_mean),
        image_std=tuple(image_processor.image_std),
        **limits,
    )


def resized_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """Return the (width, height) in pixels at which the model sees an image: the one owner of the resize rule."""
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"an image of {width} x {height} pixels is over {MAX_ASPECT_RATIO} times as long as wide: "
            "crop or tile it before conversion"
        )
    factor = spec.patch_size * spec.merge_size
    resized_height, resized_width = smart_resize(height, width, factor, spec.min_pixels, spec.max_pixels)
    return resized_width, resized_height


def patchify(
    image: bytes | Image.Image, spec: ImageSpec, drawn: Drawn | None = None
) -> tuple[UInt8[Tensor, "P values"], tuple[int, int, int]]:
    """Resize an image, encoded or RGB, and cut it into patches; show it as `drawn`, if that is given.

    Returns:
        Patches of 3 * patch * patch values, those of one merged vision token adjacent; and the grid
        (1, patches along height, patches along width).
    """
    pixels = shown_pixels(image, spec, drawn)
    height, width = pixels.shape[1:]
    patch, merge = spec.patch_size, spec.merge_size
    rows, columns = height // patch, width // patch
    # One row of a patch is one element, so the transposition copies `patch` bytes at a time.
    strips = np.ascontiguousarray(pixels.numpy()).view(np.dtype((np.void, patch)))  # (3, height, columns)
    blocks = strips.reshape(3, rows // merge, merge, patch, columns // merge, merge)
    blocks = np.ascontiguousarray(blocks.transpose(1, 4, 2, 5, 0, 3))  # (rows / m, columns / m, m, m, 3, patch)
    return torch.from_numpy(blocks.view(np.uint8)).view(rows * columns, spec.patch_values), (1, rows, columns)


def shown_pixels(
    image: bytes | Image.Image, spec: ImageSpec, drawn: Drawn | None = None
) -> UInt8[Tensor, "3 height width"]:
    """Return the pixels of an image, encoded or RGB, as the model sees them; arguments as of `patchify`."""
    pixels = decode_pixels(image) if isinstance(image, bytes) else F.pil_to_tensor(image)  # (3, height, width)
    stored_height, stored_width = pixels.shape[1:]
    if drawn is not None:
        return drawn.apply(pixels, resized_size(*drawn.size, spec))
    width, height = resized_size(stored_width, stored_height, spec)
    if (width, height) != (stored_width, stored_height):
        pixels = F.resize(pixels, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return pixels


def decode_pixels(data: bytes) -> UInt8[Tensor, "3 height width"]:
    """Return the pixels of `open_image`: a plain JPEG decodes faster without Pillow."""
    if is_plain_jpeg(data):
        try:
            return cast(Tensor, decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)))
        except RuntimeError:  # broken: Pillow gives the reason
            pass
    return F.pil_to_tensor(open_image(data))
