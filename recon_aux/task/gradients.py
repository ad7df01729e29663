"""Gradients that the forward pass computes, so that the backward pass only hands them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def trained_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters of a module that are trained, each once.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> layer.bias.requires_grad = False
        >>> [tuple(p.shape) for p in trained_tensors(layer)]
        [(2, 4)]
    """
    # FSDP's first version keeps parameters as plain attributes while a module runs
    found = (x for m in module.modules() for x in (*m._parameters.values(), *vars(m).values()))
    return list(dict.fromkeys(x for x in found if isinstance(x, Tensor) and x.requires_grad))


def with_gradients(
    loss: Tensor,
    weight: float,
    inputs: Sequence[tuple[Tensor, Tensor]],
    scales: Mapping[Tensor, float],
) -> Tensor:
    """Return ``weight * loss``, whose gradients are computed here and now.

    On a GPU the CPU has time for that: the GPU still works on the encoder. The backward pass of the
    whole model then has almost nothing to launch for the task. The task's activations are freed
    here. A loss scale multiplies gradients in float32.

    Args:
        loss: a scalar.
        weight: factor of the loss.
        inputs: the tensors that get gradients, each with the tensor that the loss was computed
            from in its place.
        scales: factors of some of their gradients.

    Returns:
        A scalar without the loss's graph. It can be differentiated once.

    Raises:
        RuntimeError: if a parameter isn't used, and in a backward pass with ``create_graph=True``.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> inner = x.detach().requires_grad_()
        >>> with_gradients(inner**2, 10.0, [(x, inner)], {x: 0.5}).backward()
        >>> x.grad
        tensor(30.)
    """
    if not loss.requires_grad:
        return weight * loss
    with _without_hooks(inner := [inner for _, inner in inputs]):
        computed: Sequence[Any] = torch.autograd.grad(loss, inner, allow_unused=True)
    if unused := sum(g is None and x is y for (x, y), g in zip(inputs, computed, strict=True)):
        raise RuntimeError(
            f"expected the loss to use all of the decoder's parameters, but {unused} aren't in its "
            "graph. With FSDP2, call fully_shard(model.recon_aux), and don't shard its layers."
        )
    used = [(x, g) for (x, _), g in zip(inputs, computed, strict=True) if g is not None]
    outer, gradients = [x for x, _ in used], [g for _, g in used]
    if at := [i for i, x in enumerate(outer) if x in scales]:
        scaled = torch._foreach_mul([gradients[i] for i in at], [scales[outer[i]] for i in at])
        for i, gradient in zip(at, scaled, strict=True):
            gradients[i] = gradient
    handed: Tensor = _HandOut.apply(loss.detach(), weight, gradients, *outer)
    return handed


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep users' hooks on parameters for the backward pass."""
    found = [hooks for x in tensors if (hooks := x._backward_hooks)]
    kept = [dict(hooks) for hooks in found]
    for hooks in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, its in zip(found, kept, strict=True):
            hooks.update(its)


class _HandOut(torch.autograd.Function):
    """Gives a loss the gradients that are known."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, weight: float, gradients: Sequence[Tensor], *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.weight, ctx.dtypes = weight, [x.dtype for x in inputs]
        return weight * loss

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "recon_aux: expected a backward pass that is differentiated no more, got "
                "create_graph=True. Pass create_graph=False, or differentiate the method's loss "
                "alone, before recon_aux's is added."
            )
        scaled = torch._foreach_mul(ctx.saved_tensors, by_loss * ctx.weight)
        return None, None, None, *(g.to(t) for g, t in zip(scaled, ctx.dtypes, strict=True))
