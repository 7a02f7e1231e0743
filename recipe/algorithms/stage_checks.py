"""Whether a step moved what it should: a sum over the bits of every parameter before and after it."""

import logging
from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from composer import State
from composer.utils import dist
from torch import Tensor, nn
from torch.nn import Parameter

from recipe.algorithms.norms import local, named_groups

log = logging.getLogger(__name__)

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24  # elements: torch sums narrow integers in a 64-bit copy of them


def plain_name(name: str) -> str:
    """A parameter's name in the model that neither DDP nor FSDP1 wraps."""
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")


def check_membership(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every trainable parameter is in exactly one optimizer group.

    Raises:
        RuntimeError: Naming one that is not.
    """
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    counts = {identity: held.count(identity) for identity in set(held)} if len(set(held)) < len(held) else {}
    known = set(held)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (id(parameter) not in known or counts.get(id(parameter), 1) != 1):
            number = counts.get(id(parameter), 0)
            raise RuntimeError(
                f"{plain_name(name)} is trainable, but {number} optimizer groups hold it instead of one: "
                "build the optimizer with recipe.optim.build_optimizer after the last change to the model"
            )


class MovementCheck:
    """Compares the parameters before and after one step, on all ranks: frozen ones bit-equal, trained groups moved.

    Reads the weights twice and copies none.

    Args:
        state: At the start of the batch.
        groups: To look at.
        trained: Those of them that the step is to move.
    """

    def __init__(self, state: State, trained: set[str]):
        names = {id(parameter): plain_name(name) for name, parameter in state.model.named_parameters()}
        groups = named_groups(state.optimizers[0])
        self.trained = trained
        self.parameters: list[tuple[str, str, Parameter]] = [
            (group, names[id(parameter)], parameter)
            for group, parameters in groups.items()
            for parameter in parameters
            if group in trained or not parameter.requires_grad
        ]
        self.sums = bit_sums([parameter for _, _, parameter in self.parameters])

    def finish(self, batch: int, rates: Mapping[str, float]) -> set[str]:
        """Judges the step and returns the trained groups that it could judge: those with a gradient other than 0.

        None at all where the optimizer may have made no step, as the gradients were taken away. Collective: one
        all-reduce and one wait for the device.

        Args:
            batch: For messages.
            rates: Learning rate of each group.

        Raises:
            RuntimeError: On all ranks: a frozen parameter changed, or a whole group with a gradient did not.
        """
        parameters = [parameter for _, _, parameter in self.parameters]
        changed = (bit_sums(parameters) != self.sums).double()
        found = torch.stack([changed, _greatest_gradients(parameters)])
        dist.all_reduce(found, reduce_operation="MAX")
        moved, gradients = found.tolist()
        if not any(gradients):
            return set()
        for (group, name, parameter), has_moved in zip(self.parameters, moved, strict=True):
            if has_moved and not parameter.requires_grad:
                raise RuntimeError(f"batch {batch} changed {name}, though the group {group} is frozen in this stage")
        if not all(map(isfinite, gradients)):
            return set()
        judged: set[str] = set()
        for group in sorted(self.trained):
            rows = [index for index, entry in enumerate(self.parameters) if entry[0] == group]
            if not any(gradients[index] for index in rows):
                continue  # of the head, where no picture of the batch has annotations
            judged.add(group)
            still = [self.parameters[index][1] for index in rows if not moved[index]]
            if len(still) == len(rows):
                raise RuntimeError(
                    f"batch {batch} moved no parameter of the group {group}, though it has a gradient: the learning "
                    f"rate {rates[group]:g} is lost in the rounding of {self.parameters[rows[0]][2].dtype} weights"
                )
            if still and dist.get_global_rank() == 0:
                some = ", ".join(still[:5]) + (", ..." if len(still) > 5 else "")
                log.warning(
                    "batch %d left %d parameters of the group %s as they were: %s", batch, len(still), group, some
                )
        return judged


@torch.no_grad()
def bit_sums(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the bits of this rank's part of each tensor, read as integers: (n,) int64, wrapping around."""
    return torch.stack([_bit_sum(local(tensor)) for tensor in tensors])


def _bit_sum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().view(_INTEGERS[tensor.element_size()]).flatten()
    return torch.stack([chunk.sum(dtype=torch.int64) for chunk in bits.split(_CHUNK)]).sum()


def _greatest_gradients(parameters: Sequence[Parameter]) -> Tensor:
    """The greatest absolute entry of this rank's part of each gradient, 0 without one, infinite for NaN: (n,)."""
    result = torch.zeros(len(parameters), dtype=torch.float64, device=local(parameters[0]).device)
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None and local(parameter.grad).numel():
            result[index] = local(parameter.grad).abs().max()
    return result.nan_to_num(nan=torch.inf, posinf=torch.inf)
