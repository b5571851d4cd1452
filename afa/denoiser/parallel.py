"""Experts on several devices: each process holds some of them, and all processes blend the same features.

After a fused stage every process gets the features of all experts, and computes the same aggregators on them.
So an ensemble of N takes about as long as one expert, and draws what one process draws, bit for bit where the
devices are of one kind. What is sent in a step are the features of the fused stages, N - 1 times.
"""

from collections.abc import Sequence
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
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in own):
            raise NotImplementedError("experts on several devices cannot be trained; use one device, or DDP")
        mine = torch.stack(list(own))
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine.contiguous())
        self.sent += mine.nbytes * (len(parts) - 1)
        return [tensor for part in parts for tensor in part]


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
