"""Final hidden states on their way from a frozen model to the loss, as sequence shards.

They wait for the student's schedule on its last stage: each tensor parallel rank keeps its share of
the positions, on the device up to a byte budget, below it (`offload`) beyond. Each is taken once.

Shapes: L x R positions of a micro-batch (Megatron's order), D hidden, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.distributed.collectives import all_gather
from megatron_sgopd.training.offload import Offloader


class HiddenStates:
    """The states of one frozen model for one step, in the order they were put."""

    def __init__(
        self, tp_group: dist.ProcessGroup, device: torch.device, budget_bytes: float | None
    ) -> None:
        self.tp_group, self.device, self.budget_bytes = tp_group, device, budget_bytes
        self.device_bytes = 0
        self.peak_device_bytes = 0
        self.spilled_bytes = 0

    def put(self, states: Tensor, length: int) -> StoredStates:
        """Keeps this rank's shard of `states`: [L, R, D], or [L / TP, R, D] when it is one already.

        `length` is L.
        """
        size, rank = self.tp_group.size(), self.tp_group.rank()
        each = -(-length // size)
        if states.shape[0] == length and size > 1:
            states = states[rank * each : (rank + 1) * each]
            states = torch.nn.functional.pad(states, (0, 0, 0, 0, 0, each - states.shape[0]))
        shard = states.detach().clone()  # a view would keep the whole alive
        num_bytes = shard.numel() * shard.element_size()
        fits = self.budget_bytes is None or self.device_bytes + num_bytes <= self.budget_bytes
        stored = StoredStates(self, shard, length, None if fits else Offloader(self.device))
        if stored.offloader is None:
            self.device_bytes += num_bytes
            self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)
        else:
            stored.offloader.offload([shard])
            self.spilled_bytes += num_bytes
        return stored


@dataclass
class StoredStates:
    """One micro-batch's shard; `offloader` holds its bytes when they are off the device."""

    owner: HiddenStates
    shard: Tensor | None  # [ceil(L / TP), R, D]; None once taken
    length: int
    offloader: Offloader | None

    def take(self) -> Tensor:
        """The whole states [R * L, D], gathered over the tensor parallel group; once only."""
        states = self.look()
        if self.offloader is not None:
            self.offloader.close()
        elif self.shard is not None:
            self.owner.device_bytes -= self.shard.numel() * self.shard.element_size()
        self.shard = None
        return states

    def look(self) -> Tensor:
        """The same for a pass that is not the last one: the shard stays."""
        shard = self.shard
        assert shard is not None, "hidden states are taken once"
        if self.offloader is not None:
            self.offloader.restore()
        group = self.owner.tp_group
        if group.size() > 1:
            shard = all_gather(shard, group).flatten(0, 1)[: self.length]
        states = shard.transpose(0, 1).flatten(0, 1)
        if self.offloader is not None and self.shard is not None:
            states = states.clone()  # a micro-batch of one row is a view of the shard
            self.offloader.offload([self.shard])
        return states
