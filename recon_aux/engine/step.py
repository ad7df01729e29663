"""One running step: made when it starts, dropped when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recon_aux.engine.autograd import reached
from recon_aux.task import ReconAuxOutput

Pair = tuple[Tensor, Tensor]


class EncoderCall(NamedTuple):
    """One call of an encoder.

    Attributes:
        encoder: that was called.
        image: what it took.
        output: the very tensor that it returned.
        feature: that tensor, or what ``features=`` made of it.
        returned: all tensors that it returned, with gradient.
        in_training: whether it was in training mode.
        versions: of images and output, which count changes in place.
    """

    encoder: nn.Module
    image: Tensor
    output: Tensor
    feature: Tensor
    returned: list[Tensor]
    in_training: bool
    versions: tuple[int | None, int | None]

    @property
    def pixels(self) -> int:
        """How many pixels an image has."""
        return self.image.shape[-2:].numel()

    @property
    def sources(self) -> list[Tensor]:
        """The returned tensors that the feature was made of, or the feature, if returned."""
        if any(x is self.feature for x in self.returned):
            return [self.feature]
        return reached(self.feature, self.returned) or [self.output]

    @property
    def changed(self) -> tuple[bool, bool]:
        """Whether images and output were changed in place since, as far as torch counts it."""
        image, output = self.versions
        return (
            image not in (None, version_in_place(self.image)),
            output not in (None, version_in_place(self.output)),
        )


def calls_behind(
    loss: Tensor, calls: Sequence[EncoderCall], avoiding: Sequence[Tensor] = ()
) -> list[EncoderCall]:
    """Give the calls that a loss depends on, through the feature or what it was made of.

    Args:
        loss: with gradient.
        calls: to look through.
        avoiding: tensors. What a loss depends on through one of them alone doesn't count.
    """
    sources = [call.sources for call in calls]
    nodes = [x.grad_fn for x in avoiding if x.grad_fn is not None]
    found = {id(x) for x in reached(loss, [x for its in sources for x in its], avoiding=nodes)}
    pairs = zip(calls, sources, strict=True)
    return [call for call, its in pairs if any(id(x) in found for x in its)]


def version_in_place(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None where torch doesn't count it."""
    unknown = torch.compiler.is_compiling() or tensor.is_inference()
    return None if unknown else tensor._version


class OtherCall(NamedTuple):
    """A call of another module: its images, its outputs' shapes, whether it is like the encoder."""

    module: nn.Module
    image: Tensor | None
    shapes: set[torch.Size]
    is_alike: bool


class Views(NamedTuple):
    """Two views, the feature of each, and the encoder's calls with gradient."""

    images: Pair
    features: Pair
    online: list[EncoderCall]


class EarlyTask(NamedTuple):
    """The task's output for two views, run early, and what must not change until it is used.

    Attributes:
        views: the two views.
        weight: the task's weight.
        versions: for each output of an encoder its version, and whether it has a gradient.
        output: the task's output.
        keep: to be called if the output is used.
    """

    views: Views
    weight: float
    versions: list[tuple[int | None, bool]]
    output: ReconAuxOutput
    keep: Callable[[], None]


class Step:
    """What went through the encoders, and what the heads received.

    Attributes:
        calls: of the encoders.
        masked: what masked heads received, with gradient.
        masked_without_gradient: whether a masked head received anything without.
        fed: heads that received an encoder's feature, with gradient.
        detached: heads that received such a feature without its gradient.
        not_fed: heads that received something else, with gradient.
        unsure: heads that received a tensor without gradient whose origin can't be seen.
        misses_encoder: whether the loss of a ``training_step`` depends on none of the calls.
        others: what other modules gave without gradient, as unknown momentum encoders do.
        early: the task's output, if the task ran before the method's loss.
        versions: in a loop, of each encoder's parameters, at its first call.
    """

    def __init__(self) -> None:
        self.calls: list[EncoderCall] = []
        self.masked: list[Tensor] = []
        self.masked_without_gradient = False
        self.fed: list[nn.Module] = []
        self.detached: list[nn.Module] = []
        self.not_fed: list[nn.Module] = []
        self.unsure: list[nn.Module] = []
        self.misses_encoder = False
        self.others: list[OtherCall] = []
        self.early: EarlyTask | None = None
        self.versions: dict[int, int] = {}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Find the tensors in a batch, or in what an encoder takes or returns, but scalars."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
        return
    if is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
