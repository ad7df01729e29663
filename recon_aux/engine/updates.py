"""Notice an optimizer that updates the encoder and leaves the decoder as it is."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from recon_aux.task.turns import awaits_step, has_optimizer, version_of

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
        self._is_sure = False
        # the decoder's values at the first miss: some updates change no version
        self._values: list[tuple[Tensor, Tensor]] = []

    def verify(self, encoder: nn.Module, aux: nn.Module) -> None:
        """Compare with the last look.

        Raises:
            RuntimeError: at the second update in a row that missed the decoder, unless frozen.
        """
        ours = [parameter for parameter in aux.parameters() if parameter.requires_grad]
        if not ours or self._is_sure:
            return
        now = version_of(encoder.parameters()), version_of(aux.parameters())
        before, self._versions = self._versions, now
        if before is None:
            return
        encoder_moved, decoder_moved = now[0] != before[0], now[1] != before[1]
        # what changes weights between micro-batches, as clamping, is no step
        if encoder_moved and not awaits_step(aux):
            self.missed = 0 if decoder_moved else self.missed + 1
        elif not (encoder_moved or decoder_moved or self._has_looked):
            # fused optimizers change no version
            self._has_looked = True
            if has_optimizer(encoder) and not has_optimizer(aux):
                warnings.warn(f"recon_aux: {_ADVICE}", stacklevel=2)
        if self.missed == 2:
            self._is_sure = any(not torch.equal(p, before) for p, before in self._values)
            if not self._is_sure:
                raise RuntimeError(_ADVICE)
        self._values = [(p, p.detach().clone()) for p in ours] if self.missed == 1 else []
