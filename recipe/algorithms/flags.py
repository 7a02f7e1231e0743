"""Which loss terms, outputs and gradients of a microbatch are not finite, judged together once the step is over.

A gradient is averaged over ranks before anyone sees it, and so is what was wrong with it. The gradients of the head's
outputs come before: by them the microbatch is still told.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recipe.network import JointOutputs


class MicrobatchFlags:
    """What one microbatch has shown: small tensors, cheaper to keep than to judge one by one.

    Args:
        sample_ids: Of the microbatch.
    """

    def __init__(self, sample_ids: Sequence[str]):
        self.sample_ids = list(sample_ids)
        self._values: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Keeps the values."""
        self._values.update({name: value.detach() for name, value in values.items()})

    def add_gradients(self, outputs: Mapping[str, Tensor]) -> None:
        """Keeps, once the backward pass has come by, the gradients of the outputs."""
        for name, output in outputs.items():
            if output.requires_grad:
                output.register_hook(partial(self._keep_gradient, f"gradient of {name}"))

    def count(self) -> Tensor:
        """How many values are not finite: () float64 on the device."""
        return _not_finite(list(self._values.values())).sum(dtype=torch.float64)

    def names(self) -> list[str]:
        """Of the values that are not finite. Waits for the device."""
        raised = _not_finite(list(self._values.values())).tolist()
        return [name for name, flag in zip(self._values, raised, strict=True) if flag]

    def _keep_gradient(self, name: str, gradient: Tensor) -> None:
        self._values[name] = gradient.detach()


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


def _not_finite(values: list[Tensor]) -> Tensor:
    """(len(values),) bool."""
    # 0 times what is finite is 0, else NaN: two fused passes, and nothing finite is too large for them.
    zeros = torch._foreach_mul(values, 0.0)  # pyright: ignore[reportPrivateImportUsage]
    return torch.isnan(torch.stack(list(torch._foreach_norm(zeros))))  # pyright: ignore[reportPrivateImportUsage]
