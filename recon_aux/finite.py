"""See to it that the loss is finite, without waiting for a GPU to say so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compiled import not_compiled

# without one that is finite; a loss scaler of torch has come down to 1 by then
_MANY_OVERFLOWS = 20


class _Step(NamedTuple):
    """What is to be told of a step, should its loss not be finite."""

    number: int
    is_finite: Tensor
    has_arrived: Callable[[], bool]
    loss: Tensor
    target: Tensor
    features: list[Tensor]
    scaled: bool


class FiniteCheck:
    """Refuses losses that aren't finite: on a CPU at once, on a GPU when the news has come.

    Reading a number from a GPU would stop the process until the GPU has done all that it was given.
    The number is sent instead, and read in one of the next steps.
    """

    def __init__(self) -> None:
        self.overflows = 0
        self.under_way: deque[_Step] = deque()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the steps under way out of copies."""
        return {**vars(self), "under_way": deque()}

    @not_compiled
    def __call__(
        self, number: int, loss: Tensor, target: Tensor, features: Sequence[Tensor]
    ) -> None:
        """Look at this step's loss and at what has come of earlier ones.

        Args:
            number: the step's.
            loss: a scalar.
            target: the views that were rebuilt.
            features: of both views.

        Raises:
            FloatingPointError: if a loss is not finite; in float16, where a loss scaler skips such
                steps, if it is so in twenty in a row, or if the views aren't finite.
        """
        loss, features = loss.detach(), [feature.detach() for feature in features]
        flag, has_arrived = _send(torch.isfinite(loss))
        scaled = any(feature.dtype == torch.float16 for feature in features) or (
            torch.is_autocast_enabled(loss.device.type)
            and torch.get_autocast_dtype(loss.device.type) == torch.float16
        )
        self.under_way.append(_Step(number, flag, has_arrived, loss, target, features, scaled))
        while self.under_way and self.under_way[0].has_arrived():
            self._judge(self.under_way.popleft())

    def _judge(self, step: _Step) -> None:
        if step.is_finite:
            self.overflows = 0
            return
        self.overflows += 1
        fit = bool(torch.isfinite(step.target).all())
        if step.scaled and self.overflows <= _MANY_OVERFLOWS and fit:
            return
        self.under_way.clear()
        raise FloatingPointError(
            f"expected a finite reconstruction loss, got {step.loss.item()} in step {step.number}; "
            f"the view's pixels range from {_span(step.target)}, the features from "
            f"{_span(step.features[0])} and {_span(step.features[1])}. Look for NaN or infinity in "
            f"{'the encoder and its weights' if fit else 'the data'}, or train with a lower "
            "learning rate or weight="
        )


def _send(flag: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """Bring a flag to the CPU; say where it will be, and how to ask whether it is."""
    if flag.device.type != "cuda":
        return flag, _at_once
    arriving = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
    arriving.copy_(flag, non_blocking=True)
    return arriving, torch.cuda.current_stream(flag.device).record_event().query


def _at_once() -> bool:
    return True


def _span(x: Tensor) -> str:
    return f"{x.min().item():.3g} to {x.max().item():.3g}"
