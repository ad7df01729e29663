"""See to it that the loss is finite, without waiting for a GPU to say so."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# calls without one that is finite; torch's loss scaler comes down to 1 in 16 steps, each of as many
# calls as are accumulated
_MANY_OVERFLOWS = 200


class _Event(Protocol):
    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class _Step(NamedTuple):
    """What is to be told of a step, on its way to the CPU until the event has happened."""

    number: int
    numbers: Tensor
    event: _Event | None
    scaled: bool


class FiniteCheck:
    """Refuses losses that aren't finite: on a CPU at once, on a GPU when the news has come.

    Reading a number from a GPU would stop the process until the GPU has done all that it was given.
    The numbers are sent instead, and read in one of the next steps, or before a state_dict is made.
    """

    def __init__(self) -> None:
        self.overflows = 0
        self.under_way: deque[_Step] = deque()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the steps under way out of copies."""
        return {**vars(self), "under_way": deque()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, number: int, loss: Tensor, views: Tensor, features: Sequence[Tensor]
    ) -> None:
        """Look at this step's loss and at what has come of earlier ones.

        Args:
            number: the step's.
            loss: a scalar.
            views: both, one after the other.
            features: of both.

        Raises:
            FloatingPointError: if a loss is not finite; in float16, where a loss scaler skips such
                steps, if it is so in more than 200 in a row, or if the views aren't finite.
        """
        scaled = any(feature.dtype == torch.float16 for feature in features) or (
            torch.is_autocast_enabled(loss.device.type)
            and torch.get_autocast_dtype(loss.device.type) == torch.float16
        )
        ranges = [x.detach().aminmax() for x in (views, *features)]
        told = [loss.detach(), *(bound for span in ranges for bound in span)]
        numbers = torch.stack([x.float() for x in told])
        self.under_way.append(_Step(number, *_send(numbers), scaled))
        while self.under_way and _has_arrived(self.under_way[0]):
            self._judge(self.under_way.popleft())

    def flush(self) -> None:
        """Wait for what is under way, before the weights are saved or handed out.

        Raises:
            FloatingPointError: as when called.
        """
        while self.under_way:
            step = self.under_way.popleft()
            if step.event is not None:
                step.event.synchronize()
            self._judge(step)

    def _judge(self, step: _Step) -> None:
        loss, *bounds = step.numbers.tolist()
        if math.isfinite(loss):
            self.overflows = 0
            return
        self.overflows += 1
        fit = all(map(math.isfinite, bounds[:2]))
        if step.scaled and self.overflows <= _MANY_OVERFLOWS and fit:
            return
        self.under_way.clear()
        spans = [f"{bounds[i]:.3g} to {bounds[i + 1]:.3g}" for i in (0, 2, 4)]
        raise FloatingPointError(
            f"expected a finite reconstruction loss, got {loss} in step {step.number}; the views' "
            f"pixels range from {spans[0]}, the features from {spans[1]} and {spans[2]}. Look for "
            f"NaN or infinity in {'the encoder and its weights' if fit else 'the data'}, or train "
            "with a lower learning rate or weight="
        )


def _send(numbers: Tensor) -> tuple[Tensor, _Event | None]:
    """Bring numbers to the CPU; say where they will be, and what happens when they are there."""
    if numbers.device.type != "cuda":
        return numbers, None
    arriving = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    arriving.copy_(numbers, non_blocking=True)
    return arriving, torch.cuda.current_stream(numbers.device).record_event()


def _has_arrived(step: _Step) -> bool:
    return step.event is None or step.event.query()
