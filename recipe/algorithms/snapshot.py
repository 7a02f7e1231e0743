"""Keep the last good parameters, optimizer state and buffers in host memory or on disk: each rank its own shards."""

from pathlib import Path

import torch
from composer.core import State
from composer.utils import dist
from torch import Tensor
from torch.nn import Parameter

from recipe.models.network import AVERAGE
from recipe.optim.groups import local, square_sums
from recipe.records import replacing
from recipe.upstream.agreement import agree
from recipe.upstream.torch_private import foreach_copy_


class Snapshot:
    """Copy what one rank trains: weights, averages, buffers and optimizer state; random states and times are left out.

    Nothing is gathered. Costs 12 bytes per parameter that AdamW trains in float32, 6 with 8-bit moments; pinned memory
    is allocated in powers of two, so up to twice as much.

    Args:
        path: A file of this rank's own to keep the copy in; None: in host memory.
    """

    def __init__(self, path: Path | None = None):
        self.batch = -1  # at which it was taken
        self.path = path
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, state: State) -> None:
        """Copy everything, reusing the memory of the last copy; all ranks must call it.

        Raises:
            OSError: On every rank: the file of one cannot be written.
        """
        live = _live_tensors(state)
        if self.path is not None:
            self._write(live, self.path)
        else:
            for name, tensor in live.items():
                copy = self._copies.get(name)
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies = {name: self._copies[name] for name in live}
            # No wait needed: the next optimizer step is queued after the copies on the same stream.
            foreach_copy_(list(self._copies.values()), list(live.values()), non_blocking=True)
        self.batch = int(state.timestamp.batch)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Copy everything back; drop the optimizer state of parameters that had none."""
        assert self.batch >= 0, "no snapshot was taken"
        copies = self._copies
        if self.path is not None:
            copies = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        optimizer = state.optimizers[0]
        for index, parameter in enumerate(_parameters(state)):
            if not any(f"state.{index}.{key}" in copies for key in optimizer.state.get(parameter, {})):
                optimizer.state.pop(parameter, None)
        live = _live_tensors(state)
        foreach_copy_([live[name] for name in copies], list(copies.values()), non_blocking=True)
        for index, parameter in enumerate(_parameters(state)):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, int):  # the steps of 8-bit AdamW
                    optimizer.state[parameter][key] = int(copies[f"state.{index}.{key}"])

    def _write(self, live: dict[str, Tensor], path: Path) -> None:
        error = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                torch.save(live, partial)
        except (OSError, RuntimeError) as raised:
            reason = str(raised).splitlines()[0]
            error = OSError(f"{path} cannot be written ({reason}): free disk space, or set nan_rollback.snapshot=off")
        agree(error)

    def remove(self) -> None:
        """Remove the file, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def weights_are_finite(state: State) -> bool:
    """Return whether all parameters and buffers are finite on all ranks; one all-reduce and one host wait."""
    parameters = [parameter for parameter in state.model.parameters() if parameter.is_floating_point()]  # not nf4
    buffers = [buffer for buffer in state.model.buffers() if buffer.is_floating_point()]
    sums = square_sums([parameters, buffers], parameters[0].device)
    dist.all_reduce(sums)
    return bool(torch.isfinite(sums).all())


def _parameters(state: State) -> list[Parameter]:
    return [parameter for group in state.optimizers[0].param_groups for parameter in group["params"]]


def _live_tensors(state: State) -> dict[str, Tensor]:
    """Return this rank's part of everything that training changes, by name."""
    trained = {id(parameter) for parameter in _parameters(state)}
    tensors: dict[str, Tensor] = {f"buffer.{name}": buffer for name, buffer in state.model.named_buffers()}
    for name, parameter in state.model.named_parameters():
        if id(parameter) in trained or AVERAGE in name:
            tensors[f"parameter.{name}"] = parameter
    for index, parameter in enumerate(_parameters(state)):
        for key, value in state.optimizers[0].state.get(parameter, {}).items():
            tensors[f"state.{index}.{key}"] = torch.as_tensor(value)
    return {name: local(tensor).detach() for name, tensor in tensors.items()}
