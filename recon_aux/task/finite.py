"""Refuse losses that aren't finite, and warn of one that runs away, without waiting for a GPU."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Overflows in a row that a loss scaler may skip. torch's needs 16 steps to come down to a scale of
# 1. With gradient accumulation, a step is several calls.
_MANY_OVERFLOWS = 200
# A loss runs away if it is so many times the normal one, in so many calls in a row. Untrained
# decoders reach 9 times where the first batch was unlike the rest. Good training stays below 1.5.
_FAR, _IN_A_ROW = 20, 2


class FiniteCheck:
    """Refuses losses that aren't finite: on a CPU at once, on a GPU in one of the next steps.

    Reading a number from a GPU would stop the process until the GPU has finished all its work. So
    the numbers are copied in the background. They are read when they have arrived, or before a
    ``state_dict`` is made.

    In float16 a loss scaler skips steps that overflow. There a loss is refused only after more than
    200 such steps in a row, or if the views aren't finite.

    It warns once if a finite loss runs away: more than 20 times the normal loss, twice in a row.
    """

    def __init__(self) -> None:
        self.overflows = 0
        self.far = 0
        # step, whether a loss scaler may skip it, its numbers, the event of their arrival
        self.under_way: deque[tuple[int, bool, Tensor, Any]] = deque()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the steps under way out of copies."""
        return {**vars(self), "under_way": deque()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, step: int, loss: Tensor, normal: Tensor, views: Tensor, features: Sequence[Tensor]
    ) -> None:
        """Take note of this step's loss, and judge those of earlier steps that have arrived.

        Args:
            step: its number.
            loss: a scalar.
            normal: about what the loss is for a decoder that knows nothing, a scalar.
            views: both, in one tensor.
            features: of both views.

        Raises:
            FloatingPointError: if a loss isn't finite. It names the step, and the ranges of views
                and features.
        """
        device = loss.device.type
        scaled = any(feature.dtype == torch.float16 for feature in features) or (
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        )
        ranges = [bound for x in (views, *features) for bound in x.detach().aminmax()]
        numbers = torch.stack([x.float() for x in (loss.detach(), normal, *ranges)])
        self.under_way.append((step, scaled, *_send(numbers)))
        self._judge_arrived(wait=False)

    def flush(self) -> None:
        """Wait for all losses under way and judge them, before weights are handed out.

        Raises:
            FloatingPointError: as when called.
        """
        self._judge_arrived(wait=True)

    def _judge_arrived(self, *, wait: bool) -> None:
        while self.under_way:
            step, scaled, numbers, event = self.under_way[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self.under_way.popleft()
            self._judge(step, scaled, *numbers.tolist())

    def _judge(self, step: int, scaled: bool, loss: float, normal: float, *bounds: float) -> None:
        if math.isfinite(loss):
            self.overflows = 0
            self._judge_finite(step, loss, normal)
            return
        self.overflows += 1
        views_are_finite = all(map(math.isfinite, bounds[:2]))
        if scaled and self.overflows <= _MANY_OVERFLOWS and views_are_finite:
            return
        self.under_way.clear()
        spans = [f"{bounds[i]:.3g} to {bounds[i + 1]:.3g}" for i in (0, 2, 4)]
        place = "the encoder and its weights" if views_are_finite else "the data"
        raise FloatingPointError(
            f"expected a finite reconstruction loss, got {loss} in step {step}; the views' "
            f"pixels range from {spans[0]}, the features from {spans[1]} and {spans[2]}. Look for "
            f"NaN or infinity in {place}, or train with a lower learning rate or weight="
        )

    def _judge_finite(self, step: int, loss: float, normal: float) -> None:
        # stays at its end, so that there is one warning
        if self.far < _IN_A_ROW:
            self.far = self.far + 1 if loss > _FAR * normal else 0
            if self.far == _IN_A_ROW:
                warnings.warn(
                    "recon_aux: expected a loss, before the weight, of "
                    f"{2 * normal:.3g} or less, got {loss:.4g} in step {step}: the training runs "
                    "away. Lower the learning rate, or the decoder's alone: pass decoder_lr= to "
                    "attach, or give the decoder a parameter group of its own.",
                    stacklevel=2,
                )


def _send(numbers: Tensor) -> tuple[Tensor, Any]:
    """Start to copy numbers from a GPU; return the copy, and the event of its arrival, or None."""
    if numbers.device.type != "cuda":
        return numbers, None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    return copy, torch.cuda.current_stream(numbers.device).record_event()
