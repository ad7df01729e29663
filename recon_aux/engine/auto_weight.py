"""Set the weight by the losses' gradients, for a method whose weight nobody measured."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recon_aux.engine.autograd import gradients_of, reached
from recon_aux.task import ReconAux
from recon_aux.task.checks import finite_number
from recon_aux.task.distributed import agree, are_many, mean_over_processes

Part = Callable[[Tensor], Tensor]

# the task's gradient on the features becomes at least so many times the method's
_SHARE = 2.0
# a smaller weight measured worse next to losses with a small gradient
_LEAST = 1.0


class AttachedReconAux(ReconAux):
    """The task on a live model.

    It also saves which encoder is trained, and its weight may be ``"auto"``: 1 until the first
    batch has set ``measured_weight``.

    Args:
        feature_dim: D, channels of the encoder's features.
        weight: a number or ``"auto"``.
        options: those of :class:`recon_aux.ReconAux`.
    """

    def __init__(self, feature_dim: int, *, weight: Any = "auto", **options: Any) -> None:
        self.has_auto_weight = isinstance(weight, str) and weight == "auto"
        super().__init__(feature_dim, weight=1.0 if self.has_auto_weight else weight, **options)
        # the name of the encoder that was seen to be trained
        self.encoder_name = ""
        self.measured_weight: float | None = None
        # whether the user has set the weight since
        self.weight_is_given = False

    @property
    def options(self) -> dict[str, Any]:
        """The options it was built with, defaults included: plain, to be logged."""
        options = super().options
        return {**options, "weight": "auto"} if self.has_auto_weight else options

    @property
    def weight(self) -> float:
        """Factor of the whole loss. It may be set at any time, for good."""
        if self.weight_is_given or self.measured_weight is None:
            return self._weight
        return self.measured_weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self._weight, self.weight_is_given = finite_number("weight", weight), True

    @property
    def weight_is_due(self) -> bool:
        """Whether the next batch is to set an automatic weight."""
        is_set = self.weight_is_given or self.measured_weight is not None
        return self.has_auto_weight and not is_set

    def saved_state(self) -> dict[str, Any]:
        """Add the encoder's name and, if it is automatic, the weight."""
        state = {**super().saved_state(), "encoder": self.encoder_name}
        if self.has_auto_weight:
            # as wide as any other, so that an average of two checkpoints can be read
            state["weight"] = "due" if self.weight_is_due else f"{self.weight:.6e}"
        return state

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restore the encoder's name and an automatic weight that the user hasn't set since."""
        super().load_saved_state(state)
        self.encoder_name = state.get("encoder", "")
        if self.has_auto_weight and not self.weight_is_given:
            self.measured_weight = _weight_in(state)


def _weight_in(state: dict[str, Any]) -> float | None:
    """Give the weight that a model was trained with; None if it was not set yet, or unreadable.

    Example:
        >>> [_weight_in({"options": {"weight": "auto"}, "weight": w}) for w in ("2.5e-01", "due")]
        [0.25, None]
        >>> _weight_in({"options": {"weight": 2.0}})
        2.0
    """
    weight = state["options"]["weight"]
    try:
        return float(state["weight"] if weight == "auto" else weight)
    except ValueError:
        return None


class GradientNorms:
    """Measures the gradients of the method's loss and of the task's on the encoder's features.

    Hooks in the training's own backward pass measure them, since some methods can run it only
    once.

    Example:
        >>> features = [torch.ones(4, 8, requires_grad=True) * 1 for _ in range(2)]
        >>> norms = GradientNorms()
        >>> theirs = norms.measure(features, features, stop=False)
        >>> (2 * sum(y.sum() for y in features) + 3 * sum(y.sum() for y in theirs)).backward()
        >>> norms.ratio()
        tensor(1.5000)
    """

    def __init__(self) -> None:
        # squared norms of one batch's gradients on the features: the method's, the task's
        self.squares: tuple[list[Tensor], list[Tensor]] = ([], [])

    def __getstate__(self) -> dict[str, Any]:
        """Leave a running step out of copies: its hooks fill the original's lists."""
        return {**vars(self), "squares": ([], [])}

    def measure(
        self, features: Sequence[Tensor], outputs: Sequence[Tensor], *, stop: bool
    ) -> list[Tensor]:
        """Note the gradients on features in the coming backward pass.

        Args:
            features: of the views; those with gradient are measured.
            outputs: what the encoder returned, of which these are parts.
            stop: keep the task's gradient from the encoder. Otherwise nothing is measured where a
                feature doesn't share the memory of an output.

        Returns:
            What the task is to take instead of the features.
        """
        self.squares = method, task = [], []
        live = [i for i, feature in enumerate(features) if feature.requires_grad]
        noted: dict[int, Tensor] = {}

        def note(part: Tensor | None, gradient: Tensor) -> None:
            method.append(_square(gradient if part is None else gradient.where(part != 0, 0.0)))

        def note_rest(its: dict[int, Part], gradient: Tensor) -> None:
            for i, part in its.items():
                whole = part(gradient)
                method.append(_square(whole - noted.pop(i) if i in noted else whole))

        def note_task(i: int, gradient: Tensor) -> Tensor | None:
            task.append(_square(gradient))
            if stop:
                return torch.zeros_like(gradient)
            noted[i] = gradient.detach()
            return None

        hooks: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        for output in outputs:
            its = [i for i in live if reached(features[i], [output])]
            found = ((i, _part_of(output, features[i])) for i in its)
            parts = {i: part for i, part in found if part is not None}
            if its and len(parts) == len(its):
                hooks.append((output, partial(note_rest, parts)))
            elif its and stop:
                # count only the channels and positions that the features were made of
                (part,) = gradients_of([features[i] for i in its], [output])
                hooks.append((output, partial(note, part)))
            elif its:
                return list(features)
        own = [y.view_as(y) if y.requires_grad else y for y in features]
        for tensor, hook in [*hooks, *((own[i], partial(note_task, i)) for i in live)]:
            tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        return own

    def ratio(self) -> Tensor | None:
        """Give the task's norm over the method's, once; None if no backward pass has shown it."""
        if not all(self.squares):
            return None
        method, task = (torch.stack(squares).sum() for squares in self.squares)
        self.squares = [], []
        return (task / method).sqrt()


class AutoWeight(GradientNorms):
    """Sets the weight by the gradients of one batch.

    Until the weight is known the task's gradient is kept from the encoder.

    Example:
        >>> features = [torch.ones(4, 8, requires_grad=True) * 1 for _ in range(2)]
        >>> auto = AutoWeight()
        >>> theirs = auto.measure(features, features, stop=True)
        >>> (300 * sum(y.sum() for y in features) + sum(y.sum() for y in theirs)).backward()
        >>> auto.weight("cpu")
        600.0
    """

    def __init__(self) -> None:
        super().__init__()
        self.has_agreed = False

    def __call__(
        self,
        aux: AttachedReconAux,
        loss: Tensor,
        features: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> list[Tensor]:
        """Set the weight by the last batch's gradients, or else measure this one's.

        Args:
            aux: whose weight it is.
            loss: the method's.
            features: of the two views.
            outputs: what the encoder returned with gradient.

        Returns:
            The features for ``aux`` to take.
        """
        device = aux.decoder.queries.device
        if are_many() and not self.has_agreed:
            # one process alone may have loaded the weight
            self.has_agreed = True
            loaded = torch.tensor([aux.weight], dtype=torch.float64, device=device)
            if agree([loaded], not aux.weight_is_due) and aux.weight_is_due:
                aux.measured_weight = loaded.item()
        if not aux.weight_is_due:
            return list(features)
        weight = self.weight(device)
        if weight is None and not reached(loss, outputs, strictly=True):
            weight = aux.weight
            _warn_of_weight("encoder and head, or loss, are compiled together")
        if weight is not None:
            self.squares = [], []
            aux.measured_weight = weight
            return list(features)
        return self.measure(features, outputs, stop=True)

    def weight(self, device: torch.device | str) -> float | None:
        """Give the weight, of two digits; None if it isn't known yet.

        All processes that train together give the same, and have to call this together.
        """
        sums = [sum(square.item() for square in some) for some in self.squares]
        squares = torch.tensor(sums, dtype=torch.float32, device=device)
        method, task = mean_over_processes(squares, 1).tolist()
        # no backward pass, or an overflow, which a loss scaler skips
        if not (0 < task < math.inf and method < math.inf):
            return None
        if method == 0:
            _warn_of_weight("the method's loss has no gradient on the features in this batch")
        return max(_LEAST, float(f"{_SHARE * math.sqrt(method / task):.1e}"))


def _warn_of_weight(reason: str) -> None:
    warnings.warn(
        'recon_aux: expected to see the gradients of the method\'s loss, by which weight="auto" is '
        f"set, but {reason}; the weight stays 1. Pass weight=1.0, or another number.",
        stacklevel=2,
    )


def _square(gradient: Tensor) -> Tensor:
    return gradient.detach().float().square().sum()


def _part_of(output: Tensor, feature: Tensor) -> Part | None:
    """Give the function that cuts a feature's part out of an output's gradient; None for a copy.

    Example:
        >>> output = torch.arange(6.0).view(3, 2)
        >>> _part_of(output, output[1:])(output)
        tensor([[2., 3.],
                [4., 5.]])
    """
    if feature is output:
        return lambda gradient: gradient
    storages = {x.untyped_storage().data_ptr() for x in (output, feature)}
    if len(storages) > 1 or not output.is_contiguous():
        return None
    place = feature.shape, feature.stride(), feature.storage_offset() - output.storage_offset()
    return lambda gradient: gradient.contiguous().as_strided(*place)
