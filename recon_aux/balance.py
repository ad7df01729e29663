"""Set the weight by what the losses' gradients are, for a method whose weight nobody measured."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .compiled import not_compiled
from .scale import mean_over_processes

# how much more strongly than the method's loss the task is to pull on the features
_SHARE = 2.0


class Balance:
    """Reads how strongly the method's loss and the task's pull on the encoder's features.

    By hooks in the training's own backward pass: in some methods it can run once only.

    Example:
        >>> feature = torch.ones(4, 8, requires_grad=True) * 1
        >>> balance = Balance()
        >>> theirs = balance.watch(feature)
        >>> (300 * feature.sum() + theirs.sum()).backward()
        >>> balance.weigh()
        600.0
    """

    def __init__(self) -> None:
        # squared norms of the method's gradients and of ours
        self.pulls: list[Tensor] = []

    def __getstate__(self) -> dict[str, list[Tensor]]:
        """Leave a running step out of copies."""
        return {"pulls": []}

    def watch(self, output: Tensor) -> Tensor:
        """Note what flows back to an output of the encoder; give what the task takes instead."""
        own, ours = output.view_as(output), list[Tensor]()
        # in this order: an output's gradient is whole when all that was made of it has its own
        own.register_hook(partial(_note, ours))  # type: ignore[no-untyped-call]
        output.register_hook(partial(self._compare, ours))  # type: ignore[no-untyped-call]
        return own

    def _compare(self, ours: list[Tensor], whole: Tensor) -> None:
        if ours:
            both = torch.stack([whole.detach() - ours[0], ours[0]])
            self.pulls.append(both.flatten(1).double().square().sum(1))

    @not_compiled
    def weigh(self) -> float | None:
        """Give the weight, of two digits; None if it isn't known yet.

        All processes that train together give the same, and have to ask together.
        """
        some = self.pulls or [torch.zeros(2, dtype=torch.float64)]
        method, task = mean_over_processes(torch.stack(some).sum(0), 1).sqrt().tolist()
        self.pulls = []
        weight = _SHARE * method / task if task else 0.0
        # an overflow is skipped by a loss scaler
        return float(f"{weight:.1e}") if 0 < weight < torch.inf else None


def _note(kept: list[Tensor], gradient: Tensor) -> None:
    kept.append(gradient.detach())
