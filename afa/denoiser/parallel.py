"""Experts on several devices: each process holds some of them, and all processes blend the same features.

After a fused stage every process gets the features of all experts, and computes the same aggregators on them.
So an ensemble of N takes about as long as one expert, and draws what one process draws, bit for bit where the
devices are of one kind. What is sent in a step are the features of the fused stages, N - 1 times.

In training every process computes the same loss, and features are gathered with gradients: those that all
processes have for a feature are summed at its expert. A process's gradient of the aggregators is the part of
the sum of all losses that goes through its experts; the mean over processes is the gradient of the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from afa.errors import UserError


class ExpertGroup:
    """The processes of one ensemble, and the experts of this one.

    experts: N, a multiple of the number of processes
    own:     positions of this process's experts
    sent:    bytes that it got from the others, in
    passes:  so many calls of the denoiser
    """

    def __init__(self, experts: int) -> None:
        processes, rank = dist.get_world_size(), dist.get_rank()
        if experts % processes:
            raise UserError(
                f"{experts} experts cannot be shared evenly by {processes} processes; start "
                + " or ".join(str(count) for count in range(2, experts + 1) if experts % count == 0)
            )
        each = experts // processes
        self.own = range(rank * each, (rank + 1) * each)
        self.sent = self.passes = 0

    def gather(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of all experts, in their order. own: one for each of this process's experts"""
        mine = torch.stack(list(own))
        parts: Tensor = _Gather.apply(mine)  # type: ignore[no-untyped-call]
        self.sent += mine.nbytes * (len(parts) - 1)
        return [tensor for part in parts for tensor in part]

    def from_owner(self, expert: int, own: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Return what one expert computes, in all processes; without gradients.

        expert: its position
        own:    computes it, in the process that has the expert
        device: of this process
        """
        each = len(self.own)
        found = own().contiguous() if expert in self.own else None
        facts = [None if found is None else (found.shape, found.dtype)]
        dist.broadcast_object_list(facts, src=expert // each)
        if found is None:
            assert facts[0] is not None
            shape, dtype = facts[0]
            found = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(found, src=expert // each)
        return found

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients by their means over the processes."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(whole)
        whole /= dist.get_world_size()
        for gradient, mean in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def check_parallel(parallel: str | None, processes: int, experts: int, verb: str) -> None:
    """Raise UserError for --parallel in one process. experts: of the ensemble; verb: the command"""
    if parallel is not None and processes == 1:
        raise UserError(
            f"--parallel {parallel} needs several processes, such as: "
            f"torchrun --nproc_per_node {experts} -m afa {verb} …"
        )


class _Gather(torch.autograd.Function):
    """All processes' tensors, (P, …), from one of each; in the backward pass their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = grads[0].contiguous()
        dist.all_reduce(whole)
        return whole[dist.get_rank()]


class Absent(nn.Module):
    """An expert of another process: its structure without weights, which moves nowhere."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "structure", expert.to("meta"))

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "structure"), name)

    def _apply(self, *args: Any, **kwargs: Any) -> "Absent":
        return self


def share_experts(experts: nn.ModuleList) -> ExpertGroup:
    """Drop the experts of other processes, and return the group.

    Raises UserError if they cannot be shared.
    """
    group = ExpertGroup(len(experts))
    kept = {id(tensor) for index in group.own for tensor in experts[index].parameters()}
    for index, expert in enumerate(experts):
        if index not in group.own:
            if any(id(tensor) in kept for tensor in expert.parameters()):
                raise UserError(
                    "experts that share weights (LoRAs on one base) are one model in memory; "
                    "run them in one process"
                )
            experts[index] = Absent(expert)
    return group
