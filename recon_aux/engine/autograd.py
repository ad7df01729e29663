"""Read the autograd graph: does a loss depend on a tensor, and on which way?"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.autograd.graph import Node

# all that was compiled together is one node, whose outputs can't be told apart
_COMPILED = "CompiledFunctionBackward"


def reached(
    loss: Tensor,
    tensors: Sequence[Tensor],
    *,
    avoiding: Collection[Node] = (),
    strictly: bool = False,
) -> list[bool]:
    """Say which tensors the loss depends on, without a backward pass.

    Some methods' backward passes can run once only, so this doesn't run them to see.

    Args:
        loss: with gradient.
        tensors: with gradient.
        avoiding: nodes of the graph; what the loss depends on through these alone doesn't count.
        strictly: what is compiled with a tensor doesn't count for it: no gradient flows to that.

    Returns:
        One truth for each tensor.

    Example:
        >>> import torch
        >>> x = torch.ones(3, requires_grad=True) + 0
        >>> half = x * 0.5
        >>> reached(half.sum(), [x]), reached(half.sum(), [x], avoiding=[half.grad_fn])
        ([True], [False])
    """
    edges = [(tensor.grad_fn, tensor.output_nr) for tensor in tensors]
    found = set()
    blocked, seen = set(avoiding), set()
    ahead = [(loss.grad_fn, loss.output_nr)]
    while ahead:
        edge = ahead.pop()
        if edge in seen or edge[0] is None or edge[0] in blocked:
            continue
        seen.add(edge)
        if edge in edges:
            found.add(edge)
            continue
        if edge[0].name() == _COMPILED and not strictly:
            found.update(other for other in edges if other[0] is edge[0])
        ahead.extend(edge[0].next_functions)
    return [edge in found for edge in edges]
