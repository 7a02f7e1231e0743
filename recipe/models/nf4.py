"""Store frozen linear layers in 4 bits: nf4 with double quantization, as QLoRA, by bitsandbytes.

A weight is cut, row after row, into blocks of 64 numbers. A number is one of 16 values (4 bits) times its block's
scale; 256 scales, less their mean, are stored in 8 bits each and share a scale of their own. So a weight takes 4.127
bits: 4 + 8 / 64 + 32 / (64 * 256). Any shape fits: the last block is shorter.

bitsandbytes' own layer (0.50) is not used. On a CPU with avx512_bf16 its first evaluation repacks the weight: it raises
unless rows are multiples of 64, else later training steps get no gradient through the layer. It has no float64 either.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import BFloat16, Float, Shaped
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from recipe.config import ConfigError

# bitsandbytes is imported inside functions: only runs with nf4 need it.
BLOCK, SCALES = 64, 256  # numbers that share a scale, scales that share one: QLoRA's, and bitsandbytes' defaults
_STORED = ".nf4_"  # in the names of what an `Nf4Linear` holds instead of its weight
_PACKED, _SOURCE = ".nf4_packed", ".nf4_source"
_CHUNK = 2**24  # numbers whose sum is taken at once, to bound the copies


def check_bitsandbytes(key: str, remedy: str) -> None:
    """Raise ConfigError, which names the key that needs it, if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{key} needs bitsandbytes, which is not installed: pip install -e '.[bitsandbytes]', or {remedy}"
        )


def bfloat16_sum(weight: Shaped[Tensor, "..."]) -> int:
    """Return the sum of a tensor's bits in bfloat16, in which bases are published; reads it once."""
    chunks = weight.detach().flatten().split(_CHUNK)
    bits = [chunk.to(torch.bfloat16).view(torch.int16).sum(dtype=torch.int64) for chunk in chunks]
    return int(torch.stack(bits).sum()) if bits else 0


class Nf4Linear(nn.Linear):
    """A frozen linear layer whose weight is stored in 4 bits; computes in the precision of its input.

    `weight` is computed whenever it is read: (out_features, in_features), bfloat16. Changing that tensor changes
    nothing. What is stored are parameters, not buffers, which DDP would send to all ranks before every pass.

    Attributes:
        nf4_packed: (ceil(n / 2), 1) uint8, two of the n numbers in each.
        nf4_absmax: (blocks,) uint8, each block's scale.
        nf4_scale: (ceil(blocks / 256),) float32, that of 256 scales.
        nf4_offset: () float32, the mean of all scales.
        nf4_source: (3,) int64, rows, columns and `bfloat16_sum` of the weight that was quantized.

    Args:
        layer: Its bias is kept, its weight is rounded to bfloat16 and then quantized; on the meta device only shapes.
    """

    nf4_packed: Tensor
    nf4_absmax: Tensor
    nf4_scale: Tensor
    nf4_offset: Tensor
    nf4_source: Tensor

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        stored = _empty(layer.weight) if layer.weight.is_meta else _quantize(layer.weight.detach())
        for name, value in stored.items():
            self.register_parameter(name, Parameter(value, requires_grad=False))

    @property
    def weight(self) -> BFloat16[Tensor, "rows columns"]:  # pyright: ignore[reportIncompatibleVariableOverride] - no parameter, but read as one
        """Return the values that are stored, dequantized: (out_features, in_features), bfloat16."""
        shape = torch.Size((self.out_features, self.in_features))
        if self.nf4_packed.is_meta:
            return torch.empty(shape, dtype=torch.bfloat16, device="meta")
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        scales = dequantize_blockwise(self.nf4_absmax, absmax=self.nf4_scale, blocksize=SCALES) + self.nf4_offset
        state = QuantState(scales, shape, blocksize=BLOCK, quant_type="nf4", dtype=torch.bfloat16)
        return dequantize_4bit(self.nf4_packed, state)

    def forward(self, input: Float[Tensor, "*tokens columns"]) -> Float[Tensor, "*tokens rows"]:
        """Return the input times the transposed weight, plus the bias."""
        return _Product.apply(input, self)  # pyright: ignore[reportReturnType] - torch has no type for it


class _Product(torch.autograd.Function):
    """A product with a frozen weight; the backward pass computes the weight again, so that none is kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(rows.dtype)
        return F.linear(rows, layer.weight.to(rows.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def _quantize(weight: Tensor) -> dict[str, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.to(torch.bfloat16).contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    assert state.state2 is not None and state.offset is not None
    return {
        "nf4_packed": packed,
        "nf4_absmax": state.absmax,
        "nf4_scale": state.state2.absmax,
        "nf4_offset": state.offset,
        "nf4_source": torch.tensor([*weight.shape, bfloat16_sum(weight)], device=weight.device),
    }


def _empty(weight: Tensor) -> dict[str, Tensor]:
    blocks = -(-weight.numel() // BLOCK)
    shapes = {
        "nf4_packed": ((-(-weight.numel() // 2), 1), torch.uint8),
        "nf4_absmax": ((blocks,), torch.uint8),
        "nf4_scale": ((-(-blocks // SCALES),), torch.float32),
        "nf4_offset": ((), torch.float32),
        "nf4_source": ((3,), torch.int64),
    }
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}


def store_in_nf4(language_model: nn.Module) -> None:
    """Put an `Nf4Linear` in the place of every linear layer, one after the other, in place.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    check_bitsandbytes("model.frozen_dtype nf4", "set model.frozen_dtype=bfloat16")
    # By name: a list of the layers would keep all their weights until the last one is stored.
    for name in [name for name, layer in language_model.named_modules() if isinstance(layer, nn.Linear)]:
        parent, _, child = name.rpartition(".")
        above: Any = language_model.get_submodule(parent)
        setattr(above, child, Nf4Linear(getattr(above, child)))


def nf4_layers(model: nn.Module) -> list[Nf4Linear]:
    """Return the layers of a model that are stored in nf4."""
    return [layer for layer in model.modules() if isinstance(layer, Nf4Linear)]


def plain_shapes(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, list[int]]:
    """Return the shape of each tensor of a model by name; those stored in nf4 as the weights that they were."""
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_SOURCE):
            shapes[name.removesuffix(_SOURCE) + ".weight"] = tensor[:2].tolist()
        elif _STORED not in name:
            shapes[name] = list(tensor.shape)
    return shapes


def plain_sums(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, int]:
    """Return the `bfloat16_sum` of each tensor by name; of those stored in nf4 that of the weights that they were."""
    sums: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name.endswith(_SOURCE):
            sums[name.removesuffix(_SOURCE) + ".weight"] = int(tensor[2])
        elif _STORED not in name:
            sums[name] = bfloat16_sum(tensor)
    return sums


def num_weights(name: str, parameter: Shaped[Tensor, "..."]) -> int:
    """Return how many of the model's weights a named parameter holds: two per byte of nf4, none in its scales."""
    return parameter.numel() * (2 if name.endswith(_PACKED) else _STORED not in name)
