"""Notice an optimizer that updates the encoder and leaves the decoder as it is."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

_ADVICE = (
    "expected the optimizer to train the decoder with the encoder, saw it train the encoder alone. "
    "Make the optimizer after attaching, or call "
    "optimizer.add_param_group({'params': model.recon_aux.parameters()}). If it updates only the "
    "parameters it was made with, list model.recon_aux.parameters() with them."
)


class DecoderUpdates:
    """Looks once in each step whether the decoder is updated where the encoder is."""

    def __init__(self) -> None:
        self.missed = 0
        self._versions: tuple[int, int] | None = None
        self._has_looked = False

    def verify(self, encoder: nn.Module, aux: nn.Module) -> None:
        """Compare with the last look.

        Raises:
            RuntimeError: at the second update in a row that missed the decoder, unless frozen.
        """
        if not any(parameter.requires_grad for parameter in aux.parameters()):
            return
        now = version_of(encoder.parameters()), version_of(aux.parameters())
        before, self._versions = self._versions, now
        if before is None:
            return
        encoder_moved, decoder_moved = now[0] != before[0], now[1] != before[1]
        if encoder_moved:
            self.missed = 0 if decoder_moved else self.missed + 1
        elif not decoder_moved and not self._has_looked:
            # fused optimizers change no version
            self._has_looked = True
            if _has_optimizer(encoder) and not _has_optimizer(aux):
                warnings.warn(f"recon_aux: {_ADVICE}", stacklevel=2)
        if self.missed == 2:
            raise RuntimeError(_ADVICE)


def _has_optimizer(module: nn.Module) -> bool:
    """Whether one of torch's optimizers has parameters of a module."""
    ids = {id(parameter) for parameter in module.parameters()}
    optimizers = (x for x in gc.get_objects() if issubclass(type(x), Optimizer))
    groups = (group for x in optimizers for group in getattr(x, "param_groups", ()))
    return any(id(parameter) in ids for group in groups for parameter in group["params"])


def version_of(parameters: Iterable[Tensor]) -> int:
    """Give a number that grows with each change of some parameters."""
    return sum(parameter._version for parameter in parameters)
