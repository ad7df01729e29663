"""Set the weight by what the losses' gradients are, for a method whose weight nobody measured."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from recon_aux.engine.autograd import reached
from recon_aux.task.calibration import are_many, mean_over_processes
from recon_aux.task.task import ReconAux

# how much more strongly than the method's loss the task is to pull on the features, at least
_SHARE = 2.0
# next to losses that pull weakly, less was on the whole worse
_LEAST = 1.0


class Balance:
    """Reads how strongly the method's loss and the task's pull on the encoder's features.

    By hooks in the training's own backward pass, which in some methods can run once only. Until
    the weight is known the task's gradient is kept from the encoder.

    Example:
        >>> features = [torch.ones(4, 8, requires_grad=True) * 1 for _ in range(2)]
        >>> balance = Balance()
        >>> theirs = balance.watch(features, features)
        >>> (300 * sum(y.sum() for y in features) + sum(y.sum() for y in theirs)).backward()
        >>> balance.weigh("cpu")
        600.0
    """

    def __init__(self) -> None:
        self.agreed = False
        # squared norms of gradients on one batch's features: the method's, the task's
        self.pulls: tuple[list[Tensor], list[Tensor]] = ([], [])

    def __getstate__(self) -> dict[str, Any]:
        """Leave a running step out of copies."""
        return {**vars(self), "pulls": ([], [])}

    def __call__(
        self,
        aux: ReconAux,
        loss: Tensor,
        features: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> list[Tensor]:
        """Set the weight by the last batch's gradients, or else watch this one's.

        Args:
            aux: whose weight it is.
            loss: the method's.
            features: of the two views.
            outputs: what the encoder gave with gradient.

        Returns:
            The features for ``aux`` to take.
        """
        device = aux.decoder.queries.device
        known = None if aux.weight_is_due else aux.weight
        weight = self.agree(known, device)
        if weight is None:
            weight = self.weigh(device)
        if weight is None and not any(reached(loss, outputs, strictly=True)):
            weight = aux.weight
            _tell_of_unseen()
        if weight is not None:
            self.pulls = [], []
            if known is None:
                aux.balance_at(weight)
            return list(features)
        live = [feature for feature in features if feature.requires_grad]
        watched = iter(self.watch(live, outputs))
        return [next(watched) if feature.requires_grad else feature for feature in features]

    def agree(self, weight: float | None, device: torch.device) -> float | None:
        """Take the weight over, where one process alone has loaded it."""
        if self.agreed or not are_many():
            return weight
        self.agreed = True
        told = [float(weight is not None), weight or 0.0]
        known = torch.tensor(told, dtype=torch.float64, device=device)
        distributed.all_reduce(known)
        count, total = known.tolist()
        return total / count if count else None

    def watch(self, features: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        """Note what flows back to features; give what the task is to take instead.

        Args:
            features: of the views, as far as they have gradient, first those of the encoder's.
            outputs: what the encoder gave, of which these are, or are the first rows.
        """
        self.pulls = method, task = [], []
        rows = sum(len(feature) for feature in features)

        def note(gradient: Tensor) -> None:
            method.append(_square(gradient[:rows]))

        def keep(gradient: Tensor) -> Tensor:
            task.append(_square(gradient))
            return torch.zeros_like(gradient)

        for output in outputs:
            if any(reached(feature, [output])[0] for feature in features):
                output.register_hook(note)  # type: ignore[no-untyped-call]
        own = [feature.view_as(feature) for feature in features]
        for feature in own:
            feature.register_hook(keep)  # type: ignore[no-untyped-call]
        return own

    def weigh(self, device: torch.device | str) -> float | None:
        """Give the weight, of two digits; None if it isn't known yet.

        All processes that train together give the same, and have to ask together.
        """
        told = [sum(square.item() for square in some) for some in self.pulls]
        squares = torch.tensor(told, dtype=torch.float32, device=device)
        method, task = mean_over_processes(squares, 1).tolist()
        # no backward pass, or an overflow, which a loss scaler skips
        if not (0 < task < math.inf and method < math.inf):
            return None
        return max(_LEAST, float(f"{_SHARE * math.sqrt(method / task):.1e}"))


def _tell_of_unseen() -> None:
    warnings.warn(
        'recon_aux: expected to see the gradients of the method\'s loss, by which weight="auto" is '
        "set, but encoder and head, or loss, are compiled together; the weight stays 1; give "
        "weight=",
        stacklevel=2,
    )


def _square(gradient: Tensor) -> Tensor:
    return gradient.detach().float().square().sum()
