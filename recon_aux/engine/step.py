"""One running step: made when it starts, dropped when it ends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class EncoderCall(NamedTuple):
    """One call of an encoder: the images, and the very tensor that it returned."""

    encoder: nn.Module
    image: Tensor
    output: Tensor
    in_training: bool

    @property
    def pixels(self) -> int:
        """How many pixels an image has."""
        return self.image.shape[-2:].numel()

    @property
    def trains(self) -> bool:
        """Whether this looks like a call of the encoder that is trained."""
        return self.output.requires_grad and self.in_training


class Step:
    """What went through the encoders, and what the heads received with and without gradient."""

    def __init__(self) -> None:
        self.calls: list[EncoderCall] = []
        self.masked: list[Tensor] = []
        self.masked_without_gradient = False
