"""Which loss terms, outputs and gradients of a microbatch are not finite, kept on the device until they are asked for.

A gradient is averaged over ranks before anyone sees it, and so is what was wrong with it. The gradients of the head's
outputs come before: by them the microbatch is still told.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from recipe.network import JointOutputs


class MicrobatchFlags:
    """The flags of one microbatch.

    Args:
        sample_ids: Of the microbatch.
    """

    def __init__(self, sample_ids: Sequence[str]):
        self.sample_ids = list(sample_ids)
        self._flags: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Notes which of the values are not finite."""
        for name, flag in zip(values, _not_finite(list(values.values())), strict=True):
            self._flags[name] = flag

    def add_gradients(self, outputs: Mapping[str, Tensor]) -> None:
        """Notes, once the backward pass has come by, which of the outputs have a gradient that is not finite."""
        for name, output in outputs.items():
            if output.requires_grad:
                flag = self._flags[f"gradient of {name}"] = torch.zeros((), dtype=torch.bool, device=output.device)
                output.register_hook(lambda gradient, flag=flag: _note(flag, gradient))

    def count(self) -> Tensor:
        """How many flags are up: () float64 on the device."""
        return torch.stack(list(self._flags.values())).sum(dtype=torch.float64)

    def names(self) -> list[str]:
        """What was not finite. Waits for the device."""
        raised = torch.stack(list(self._flags.values())).tolist()
        return [name for name, flag in zip(self._flags, raised, strict=True) if flag]


def head_outputs(outputs: Any) -> dict[str, Tensor]:
    """Boxes and objectness of every layer, of object queries and denoising ones; none of another model's outputs."""
    if not isinstance(outputs, JointOutputs):
        return {}
    named = {}
    for suffix, detection in (("", outputs.detection), ("_dn", outputs.denoising and outputs.denoising[1])):
        if detection is not None:
            for index, (repeat, layer) in enumerate(detection.layers()):
                named[f"pred_boxes{suffix or repeat} of layer {index}"] = layer.pred_boxes
                named[f"pred_objectness{suffix or repeat} of layer {index}"] = layer.pred_objectness
    return {name: value for name, value in named.items() if value.numel()}


def _not_finite(values: Sequence[Tensor]) -> Sequence[Tensor]:
    # The largest absolute value of each: one fused pass that keeps NaN.
    if not values:
        return []
    greatest = torch._foreach_norm([value.detach() for value in values], inf)  # pyright: ignore[reportPrivateImportUsage]
    return (~torch.isfinite(torch.stack(list(greatest)))).unbind()


def _note(flag: Tensor, gradient: Tensor) -> None:
    flag.logical_or_(_not_finite([gradient])[0])
