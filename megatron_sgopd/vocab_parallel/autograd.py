"""Hands out a loss whose gradient was computed in the forward pass already."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

USED = (
    "backward was run through this loss already, and its gradient is gone: it was written in the "
    "forward pass and handed over in place. Compute the loss again"
)


class LogitsGradient(torch.autograd.Function):
    """A loss with the gradient [T, V] of the local logits.

    `in_place` says that the gradient lies over the logits: it is handed over once and scaled where
    it is. A gradient of its own memory can be asked for again, until somebody writes to it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, total: Tensor, grad: Tensor, in_place: bool) -> Tensor:
        ctx.grad, ctx.version, ctx.in_place = grad, grad._version, in_place
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None, None]:
        grad: Tensor | None = ctx.grad
        if grad is None or grad._version != ctx.version:
            raise RuntimeError(USED)
        if ctx.in_place:
            ctx.grad = None
        if float(factor) != 1.0:
            grad = grad.mul_(factor) if ctx.in_place else grad * factor
        return grad, None, None, None


class HiddenGradient(torch.autograd.Function):
    """A loss with the gradients of hidden states [T, D] and of the LM head's shard [V, D].

    `head_grad` None says that the head's gradient is in its `main_grad` already. The hidden states'
    gradient is summed over `group`, of whose ranks each has its vocabulary rows' part.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        total: Tensor,
        hidden_grad: Tensor | None,
        head_grad: Tensor | None,
        in_main_grad: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.hidden_grad, ctx.head_grad, ctx.group = hidden_grad, head_grad, group
        ctx.head = head if in_main_grad else None
        ctx.used = False
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        if ctx.used:
            raise RuntimeError(USED)
        ctx.used = True
        grads = [g for g in (ctx.hidden_grad, ctx.head_grad) if g is not None]
        if float(factor) != 1.0:
            if ctx.head is not None:
                raise RuntimeError(
                    f"the loss was multiplied by {float(factor)} before backward, but its gradient "
                    "is in the head's main_grad already: put the factor into token_scale"
                )
            for grad in grads:
                grad.mul_(factor)
        if ctx.hidden_grad is not None and ctx.group is not None and ctx.group.size() > 1:
            dist.all_reduce(ctx.hidden_grad, group=ctx.group)
        if ctx.head is not None:
            announce(ctx.head)
        ctx.head = None
        result = (ctx.hidden_grad, ctx.head_grad)
        ctx.hidden_grad = ctx.head_grad = None
        return (*result, None, None, None, None, None)


def announce(head: Tensor) -> None:
    """Tells Megatron's DDP that the head's gradient is in its `main_grad`.

    Its hook runs when autograd reaches the parameter; it wants a `grad` to be there, which it does
    not add. A view of one zero serves: no [V, D] buffer. Where the embedding shares the weight
    (`zero_out_wgrad`), the embedding's own gradient will be there, and the hook adds that.
    """
    head.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if not getattr(head, "zero_out_wgrad", False):
        head.grad = torch.zeros((), dtype=head.dtype, device=head.device).expand(head.shape)
