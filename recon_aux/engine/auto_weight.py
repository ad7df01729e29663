"""Set the weight by what the losses' gradients are, for a method whose weight nobody measured."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from recon_aux.engine.autograd import reached
from recon_aux.task.checks import finite_number
from recon_aux.task.distributed import are_many, mean_over_processes
from recon_aux.task.task import ReconAux

# how much more strongly than the method's loss the task is to pull on the features, at least
_SHARE = 2.0
# next to losses that pull weakly, less was on the whole worse
_LEAST = 1.0


class AttachedReconAux(ReconAux):
    """A :class:`ReconAux` on a live model, which may set its weight by the first batch.

    Args:
        feature_dim: D, the number of channels of the encoder's features.
        weight: ``"auto"`` is 1 until :class:`Balance` has set it.
        options: as for :class:`ReconAux`.

    Example:
        >>> aux = AttachedReconAux(512)
        >>> aux.options["weight"], aux.weight, aux.weight_is_due
        ('auto', 1.0, True)
    """

    def __init__(
        self, feature_dim: int, *, weight: float | Literal["auto"] = "auto", **options: Any
    ) -> None:
        super().__init__(feature_dim, weight=1.0 if weight == "auto" else weight, **options)
        self.is_balanced = weight == "auto"
        # whether it is yet to be set, and whether the user did
        self.weight_is_due, self._weight_is_given = self.is_balanced, False
        # the name of the encoder that was seen to be trained
        self.encoder_name = ""

    @property
    def options(self) -> dict[str, Any]:
        """The options it was attached with."""
        return super().options | ({"weight": "auto"} if self.is_balanced else {})

    @property
    def weight(self) -> float:
        """Factor of the whole loss; may be set, for good, at any time."""
        return super().weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self.balance_at(weight)
        self._weight_is_given = True

    def balance_at(self, weight: float | None) -> None:
        """Set what ``weight="auto"`` stands for, until its user sets another; None: 1 for now."""
        self._weight = 1.0 if weight is None else finite_number("weight", weight)
        self.weight_is_due = weight is None

    def saved_state(self) -> dict[str, Any]:
        """Return what is saved next to the weights."""
        state = {**super().saved_state(), "encoder": self.encoder_name}
        if self.is_balanced:
            # of fixed width, for averages of checkpoints
            state["weight"] = "due" if self.weight_is_due else f"{self.weight:.6e}"
        return state

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Take over what was saved, and the weight, unless the user has set another."""
        super().load_saved_state(state)
        self.encoder_name = state.get("encoder", "")
        if self.is_balanced and not self._weight_is_given:
            self.balance_at(weight_of(state))


def weight_of(state: dict[str, Any]) -> float | None:
    """Return the weight that a model was trained with; None if it was yet to be set, or unreadable.

    Example:
        >>> auto = {"options": {"weight": "auto"}}
        >>> [weight_of({**auto, "weight": weight}) for weight in ("2.500000e-01", "due")]
        [0.25, None]
        >>> weight_of({"options": {"weight": 2.0}})
        2.0
    """
    weight = state["options"]["weight"]
    try:
        return float(state.get("weight", "due") if weight == "auto" else weight)
    except ValueError:
        return None


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
        aux: AttachedReconAux,
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
