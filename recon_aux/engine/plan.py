"""What the first step found, for the steps after it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from recon_aux.engine.pairing import PairCheck


@dataclass
class Plan:
    """What the first step found, for the steps after it.

    Attributes:
        encoder: that is trained.
        calls: how many calls a step makes, if the method's loss depends on all of them. None if a
            step also encoded other images: then each step is looked through.
        other_is_momentum: whether the other view is encoded without gradient.
        interleaved: whether the views of one call take turns there, image by image.
        bypasses_heads: whether the loss depends on features that didn't pass a masked head.
        steps: how many steps were checked.
        pairs: whether the views show the same images, row by row.
        pixels: lowest and highest value of the first view.
        in_batch: whether both views are the batch's own tensors.
        shape: of a view.
        joined: whether several views came in one call.
    """

    encoder: nn.Module
    calls: int | None = 0
    other_is_momentum: bool = False
    interleaved: bool = False
    bypasses_heads: bool = False
    steps: int = 0
    pairs: PairCheck = field(default_factory=PairCheck)
    pixels: tuple[float, ...] = ()
    in_batch: bool = False
    shape: tuple[int, ...] = ()
    joined: bool = False
