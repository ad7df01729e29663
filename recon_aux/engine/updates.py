"""Notice an optimizer that updates the encoder and leaves the decoder as it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ADVICE = (
    "expected the optimizer to train the decoder with the encoder, but in the last two steps only "
    "the encoder changed. Make the optimizer after attaching, or call "
    "optimizer.add_param_group({'params': model.recon_aux.parameters()}). If it updates only the "
    "parameters it was made with, list model.recon_aux.parameters() with them."
)


class DecoderUpdates:
    """Looks once in each step whether the decoder is updated where the encoder is."""

    def __init__(self) -> None:
        self.missed = 0
        self._versions: tuple[int, int] | None = None
        # fused optimizers change no version, so values are compared until the decoder's change
        self._values: list[dict[int, Tensor]] | None = []
        self._missed_by_value = 0
        self._is_fused = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave the values out of copies, whose parameters are others."""
        return {**vars(self), "_values": None if self._values is None else []}

    def verify(self, encoder: nn.Module, aux: nn.Module) -> None:
        """Compare with the last look.

        Raises:
            RuntimeError: at the second update in a row that missed the decoder, unless frozen.
        """
        ours = [parameter for parameter in aux.parameters() if parameter.requires_grad]
        if self._is_fused or not ours:
            return
        now = version_of(encoder.parameters()), version_of(aux.parameters())
        before, self._versions = self._versions or now, now
        encoder_moved, decoder_moved = now[0] != before[0], now[1] != before[1]
        if encoder_moved:
            self.missed = 0 if decoder_moved else self.missed + 1
        if decoder_moved:
            self._values = None
        if self._values is not None:
            self._compare(encoder, ours, self._values, encoder_moved)
        if self.missed == 2:
            raise RuntimeError(_ADVICE)

    def _compare(
        self,
        encoder: nn.Module,
        ours: Sequence[Tensor],
        before: list[dict[int, Tensor]],
        encoder_moved: bool,
    ) -> None:
        # one weight of the encoder's is enough, and takes little memory
        one = [parameter for parameter in encoder.parameters() if parameter.requires_grad][:1]
        values = [{id(p): _own_part(p) for p in some} for some in (one, ours)]
        changed = [_differ(*pair) for pair in zip(values, before, strict=False)]
        if changed and changed[1]:
            self._is_fused, self._values, self.missed = True, None, 0
            return
        if changed and changed[0] and not encoder_moved:
            self._missed_by_value += 1
            # a learning rate of 0 leaves values as they are, too: no error
            if self._missed_by_value == 2:
                warnings.warn(f"recon_aux: {_ADVICE}", stacklevel=2)
        self._values = [{key: x.clone() for key, x in some.items()} for some in values]


def version_of(parameters: Iterable[Tensor]) -> int:
    """Give a number that grows with each change of some parameters."""
    return sum(parameter._version for parameter in parameters)


def _own_part(parameter: Tensor) -> Tensor:
    """Give a parameter's values, of a sharded one those that this process has."""
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach()


def _differ(some: dict[int, Tensor], others: dict[int, Tensor]) -> bool:
    pairs = [(x, others[key]) for key, x in some.items() if key in others]
    return any(
        x.shape != y.shape or x.device != y.device or not torch.equal(x, y) for x, y in pairs
    )
