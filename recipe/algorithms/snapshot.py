"""The last good parameters, optimizer state and buffers, kept in host memory: each rank its own shards."""

import torch
from composer.core import State
from composer.utils import dist
from torch import Tensor
from torch.nn import Parameter

from recipe.algorithms.norms import local, square_sums
from recipe.upstream.torch_private import foreach_copy_


class Snapshot:
    """A copy of all weights and what moves them, of one rank; nothing is gathered. Random states and times stay out.

    Weights that never train are in it too, as a fault of the memory hits them like others. Host memory: that of the
    weights and optimizer state on this rank, 12 bytes a trained parameter for AdamW in float32 and 4 of others, over
    the ranks of a node; pinned memory comes in powers of two, so up to twice as much.
    """

    def __init__(self):
        self.batch = -1  # at which it was taken
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, state: State) -> None:
        """Copies everything, into the memory of the last copy."""
        live = _live_tensors(state)
        self._copies = {name: _host_copy(self._copies.get(name), tensor) for name, tensor in live.items()}
        # Nothing waits for the copies: what moves the weights is queued behind them on the same stream.
        _copy(list(self._copies.values()), list(live.values()))
        self.batch = int(state.timestamp.batch)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Puts everything back in place. Parameters that had no optimizer state then have none again."""
        assert self._copies, "no snapshot was taken"
        optimizer = state.optimizers[0]
        for index, parameter in enumerate(_parameters(state)):
            if not any(_state_name(index, key) in self._copies for key in optimizer.state.get(parameter, {})):
                optimizer.state.pop(parameter, None)
        live = _live_tensors(state)
        _copy([live[name] for name in self._copies], list(self._copies.values()))


def weights_are_finite(state: State) -> bool:
    """Whether all parameters and buffers are finite on all ranks. Collective; one host synchronisation."""
    parameters = list(state.model.parameters())
    buffers = [buffer for buffer in state.model.buffers() if buffer.is_floating_point()]
    sums = square_sums([parameters, buffers], parameters[0].device)
    dist.all_reduce(sums)
    return bool(torch.isfinite(sums).all())


def _copy(into: list[Tensor], source: list[Tensor]) -> None:
    foreach_copy_(into, source, non_blocking=True)


def _parameters(state: State) -> list[Parameter]:
    return [parameter for group in state.optimizers[0].param_groups for parameter in group["params"]]


def _state_name(index: int, key: str) -> str:
    return f"state.{index}.{key}"


def _live_tensors(state: State) -> dict[str, Tensor]:
    """This rank's part of every weight, buffer and optimizer state, by a name."""
    tensors: dict[str, Tensor] = {f"buffer.{name}": buffer for name, buffer in state.model.named_buffers()}
    tensors |= {f"parameter.{name}": parameter for name, parameter in state.model.named_parameters()}
    for index, parameter in enumerate(_parameters(state)):
        for key, value in state.optimizers[0].state.get(parameter, {}).items():
            tensors[_state_name(index, key)] = value
    return {name: local(tensor).detach() for name, tensor in tensors.items()}


def _host_copy(copy: Tensor | None, tensor: Tensor) -> Tensor:
    if copy is not None and copy.shape == tensor.shape and copy.dtype == tensor.dtype:
        return copy
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
