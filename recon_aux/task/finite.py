"""Refuse losses that aren't finite, and warn of one that runs away, without waiting for a GPU."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Overflows in a row that a loss scaler may skip. torch's needs 16 steps, of one call or several.
_MANY_OVERFLOWS = 200
# times the normal loss: good training stays below 1.5, an untrained decoder below 10 for any images
_FAR = 20


class FiniteCheck:
    """Refuses losses that aren't finite: on a CPU at once, on a GPU in one of the next steps.

    Reading a number from a GPU would stop the process until the GPU has finished all its work. So
    the numbers are copied in the background. They are read when they have arrived, or before a
    ``state_dict`` is made.

    In float16 a loss scaler skips steps that overflow. There a loss is refused only after more than
    200 such steps in a row, or if the views aren't finite.
    """

    def __init__(self) -> None:
        self.overflows = 0
        self.far = 0
        # calls to judge later, while the task runs on trial; None otherwise
        self.noted: list[tuple[Any, ...]] | None = None
        # step, whether a loss scaler may skip it, normal loss, inputs, loss, event of its arrival
        self.under_way: deque[tuple[int, bool, float, Sequence[Tensor], Tensor, Any]] = deque()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the steps under way out of copies."""
        return {**vars(self), "under_way": deque()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, step: int, loss: Tensor, normal: float, *inputs: Tensor) -> None:
        """Take note of this step's loss, and judge those of earlier steps that have arrived.

        ``normal``: about the loss of a decoder that knows nothing; ``inputs``: views, two features.

        Raises:
            FloatingPointError: if a loss isn't finite. It names the step and the inputs' ranges.
        """
        if self.noted is not None:
            self.noted.append((step, loss, normal, *inputs))
            return
        device = loss.device.type
        scaled = any(x.dtype == torch.float16 for x in inputs) or (
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        )
        inputs = tuple(x.detach() for x in inputs)
        self.under_way.append((step, scaled, normal, inputs, *_send(loss.detach().view(1))))
        self._judge_arrived(wait=False)

    def flush(self) -> None:
        """Wait for all losses under way and judge them, before weights are handed out."""
        self._judge_arrived(wait=True)

    def _judge_arrived(self, *, wait: bool) -> None:
        while self.under_way:
            step, scaled, normal, inputs, loss, event = self.under_way[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self.under_way.popleft()
            self._judge(step, scaled, normal, loss.tolist()[0], inputs)

    def _judge(
        self, step: int, scaled: bool, normal: float, loss: float, inputs: Sequence[Tensor]
    ) -> None:
        if math.isfinite(loss):
            self.overflows = 0
            # counts on after the warning, which comes once
            self.far = self.far + 1 if loss > _FAR * normal or self.far > 1 else 0
            if self.far == 2:
                warnings.warn(
                    f"recon_aux: expected a loss, before the weight, below {2 * normal:.3g}, got "
                    f"{loss:.4g} in step {step}: training runs away. Lower the learning rate, or "
                    "the decoder's alone, by attach's decoder_lr= or a parameter group of its own. "
                    "If the first batch was darker or flatter than the others, shuffle the data: "
                    "it sets the unit of pixels.",
                    stacklevel=2,
                )
            return
        self.overflows += 1
        ranges = [[bound.item() for bound in x.aminmax()] for x in inputs]
        views_are_finite = all(map(math.isfinite, ranges[0]))
        if scaled and self.overflows <= _MANY_OVERFLOWS and views_are_finite:
            return
        self.under_way.clear()
        spans = [f"{least:.3g} to {most:.3g}" for least, most in ranges]
        place = "the encoder and its weights" if views_are_finite else "the data"
        raise FloatingPointError(
            f"expected a finite loss of the task, got {loss} in step {step}; the views' "
            f"pixels range from {spans[0]}, the features from {spans[1]} and {spans[2]}. Look for "
            f"NaN or infinity in {place}, or train with a lower learning rate or weight="
        )


def _send(loss: Tensor) -> tuple[Tensor, Any]:
    """Start to copy a loss from a GPU; return the copy, and the event of its arrival, or None."""
    if loss.device.type != "cuda":
        return loss, None
    copy = torch.empty(loss.shape, dtype=loss.dtype, device="cpu", pin_memory=True)
    copy.copy_(loss, non_blocking=True)
    return copy, torch.cuda.current_stream(loss.device).record_event()
