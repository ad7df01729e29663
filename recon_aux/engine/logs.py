"""What is logged of a step: the losses, their share of the total, the ratio of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recon_aux.engine.auto_weight import AttachedReconAux, GradientNorms
from recon_aux.engine.autograd import reached
from recon_aux.task import ReconAuxOutput
from recon_aux.task.options import TERMS

# steps from one measurement of the gradients to the next, and from one full log to the next:
# each value that Lightning logs costs it about a tenth of a millisecond
_MEASURE_EVERY, _LOG_EVERY = 50, 10


class Logs:
    """The numbers of a model's last step, as tensors: reading them on a GPU would wait for it.

    Args:
        enabled: False collects and logs nothing.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.norms = GradientNorms()
        # the last step's losses by name; the task's weighted one, and the method's
        self.losses: dict[str, Tensor] = {}
        self.sum: tuple[Tensor, Tensor] | None = None
        self.ratio: Tensor | None = None
        self.measured = 0
        self.logged = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave a step's tensors out of copies."""
        return {**vars(self), "losses": {}, "sum": None, "ratio": None}

    @property
    def is_due(self) -> bool:
        """Whether the next step's gradients are to be measured."""
        return self.enabled and self.measured % _MEASURE_EVERY == 0

    def numbers(self) -> dict[str, Tensor]:
        """Give all that is known of the last step, by the names under which it is logged."""
        numbers = {f"recon_aux/{name}": loss for name, loss in self.losses.items()}
        if self.sum is not None:
            weighted, method = (x.abs() for x in self.sum)
            numbers["recon_aux/share"] = weighted / (weighted + method)
        if self.ratio is not None:
            numbers["recon_aux/gradient_ratio"] = self.ratio
        return numbers

    def measure(
        self, loss: Tensor, features: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Measure the gradients, but only once in ``_MEASURE_EVERY`` steps.

        Args:
            loss: the method's.
            features: of the two views.
            outputs: what the encoder returned with gradient.

        Returns:
            The features for the task to take.
        """
        is_due = self.is_due
        self.measured += 1
        # what is compiled together with its head hides the method's gradient
        if is_due and reached(loss, outputs, strictly=True):
            return self.norms.measure(features, outputs, stop=False)
        return list(features)

    def log(
        self,
        model: nn.Module,
        aux: AttachedReconAux,
        output: ReconAuxOutput,
        loss: Tensor,
        batch_size: int,
    ) -> None:
        """Note a step's losses, and log them where a trainer is training.

        Args:
            model: whose ``log`` is called.
            aux: its task.
            output: of the task.
            loss: the method's.
            batch_size: of the step.
        """
        if not self.enabled:
            return
        terms = ("reconstruction", *(name for name in TERMS if getattr(aux, name) is not None))
        self.losses = {name: getattr(output, f"{name}_loss") for name in terms}
        self.losses["loss"] = output.unweighted_loss
        if aux.has_auto_weight:
            self.losses["weight"] = torch.tensor(aux.weight)
        self.sum = output.loss.detach(), loss.detach()
        # an earlier step's: this step's backward pass is still to come
        ratio = self.norms.ratio()
        # log in full where Lightning's loggers write: often in each tenth or fiftieth step
        is_full = ratio is not None or self.logged == 0 or (self.logged + 1) % _LOG_EVERY == 0
        self.ratio, self.logged = self.ratio if ratio is None else ratio, self.logged + 1
        try:
            trainer = getattr(model, "trainer", None)
            # a step that is called by hand has none, or one that isn't training
            in_training = trainer is not None and getattr(trainer, "training", True)
        except (RuntimeError, ReferenceError):  # Lightning's ways to say that there is none
            return
        log: Any = getattr(model, "log", None)
        if in_training and callable(log):
            few = {f"recon_aux/{x}": self.losses[x] for x in ("loss", "weight") if x in self.losses}
            for name, value in (self.numbers() if is_full else few).items():
                log(name, value, batch_size=batch_size)
