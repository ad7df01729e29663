"""Read the autograd graph: what does a loss depend on, and what gradient does it give?

There are three ways, since each sees something that the others can't. A walk over the graph is
cheap enough for every step, and runs nothing. ``gradients_of`` runs a part of the backward pass,
and sees which channels a head mixes. Hooks in the training's own backward pass (``auto_weight``)
see the size of the whole gradient. Some methods can run their backward pass only once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

# compiled code is one node, whose outputs can't be told apart
_COMPILED = "CompiledFunctionBackward"


def reached(
    loss: Tensor,
    tensors: Sequence[Tensor],
    *,
    avoiding: Collection[Node] = (),
    strictly: bool = False,
) -> list[Tensor]:
    """Find the tensors that a loss depends on, by a walk over the graph.

    Args:
        loss: with gradient.
        tensors: with gradient.
        avoiding: nodes of the graph. A path through one of them doesn't count.
        strictly: a tensor doesn't count only because it was compiled together with one that does.

    Returns:
        Those of the tensors, in their order.

    Example:
        >>> import torch
        >>> x = torch.ones(3, requires_grad=True) + 0
        >>> half = x * 0.5
        >>> len(reached(half.sum(), [x])), len(reached(half.sum(), [x], avoiding=[half.grad_fn]))
        (1, 0)
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
    return [tensor for tensor, edge in zip(tensors, edges, strict=True) if edge in found]


def feed_each_other(masked: Sequence[Tensor]) -> bool:
    """Whether some head received what another head had made of its input."""
    # outputs of one compiled function can't be told apart
    return any(reached(x, [y for y in masked if y.grad_fn is not x.grad_fn]) for x in masked)


def gradients_of(results: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Put random gradients on some results, and give what reaches each output, or None.

    All are None if torch has compiled the code for one backward pass only.

    Raises:
        RuntimeError: if the graph can't be read.
    """
    results = [result for result in results if result.requires_grad]
    generator = torch.Generator("cpu").manual_seed(0)
    flowing = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in results]
    if not results:
        return [None] * len(outputs)
    try:
        gradients = torch.autograd.grad(
            results, outputs, flowing, retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        if "donated buffers" in str(error):
            # compiled for one backward pass
            return [None] * len(outputs)
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "expected activation checkpointing with use_reentrant=False, got True, whose graph "
            "can't be read. Pass use_reentrant=False to checkpoint()."
        ) from error
    return list(gradients)
