"""Check on a running step that the method's loss sees the invariant channels alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .graph import reached
from .intercept import EncoderCall


def trained_encoders(loss: Tensor, calls: Sequence[EncoderCall]) -> list[nn.Module]:
    """Say which encoders the method's loss trains."""
    trains = reached(loss, [call.output for call in calls])
    encoders = {
        id(c.encoder): c.encoder for c, trained in zip(calls, trains, strict=True) if trained
    }
    return list(encoders.values())


def past_masks(loss: Tensor, outputs: Sequence[Tensor], masked: Sequence[Tensor]) -> list[Tensor]:
    """Say which of the encoder's outputs the loss depends on past what the heads received."""
    masks: list[Node] = [x.grad_fn for x in masked if x.grad_fn is not None]
    past = reached(loss, outputs, avoiding=masks)
    return [output for output, is_past in zip(outputs, past, strict=True) if is_past]


def gradients_to(outputs: Sequence[Tensor], masked: Sequence[Tensor]) -> list[Tensor]:
    """Give what flows back from the heads' inputs, whatever the heads make of them.

    It stops at the encoder's outputs and runs nothing of the method's own backward pass, which in
    some methods can run once only.
    """
    masked = [x for x in masked if x.requires_grad]
    if not masked:
        return []
    generator = torch.Generator().manual_seed(0)
    flowing = [torch.randn(x.shape, generator=generator).to(x) for x in masked]
    gradients = torch.autograd.grad(masked, outputs, flowing, retain_graph=True, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]
