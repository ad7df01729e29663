"""Notice an optimizer that updates the encoder and leaves the decoder as it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ADVICE = (
    "expected the optimizer to train the decoder with the encoder, whose weights alone were "
    "changed in the last two steps. Make the optimizer after attaching, or call "
    "optimizer.add_param_group({'params': model.recon_aux.parameters()})."
)


class DecoderUpdates:
    """Counts updates of the encoder in a row that miss the decoder, from one look to the next."""

    def __init__(self) -> None:
        self.missed = 0
        self._versions: tuple[int, int] | None = None
        # fused optimizers change no version, so values are compared until the decoder has moved
        self._values: list[list[Tensor]] | None = []
        self._missed_by_value = 0
        self._is_fused = False

    def start(self, encoder: Iterable[Tensor], decoder: Iterable[Tensor]) -> None:
        """Note how the parameters are before an update."""
        self._versions = version_of(encoder), version_of(decoder)

    def look(self, encoder: Iterable[Tensor], decoder: Iterable[Tensor]) -> tuple[bool, bool]:
        """Count an update since the last look; say whether the encoder and the decoder moved."""
        now = version_of(encoder), version_of(decoder)
        before, self._versions = self._versions or now, now
        moved = now[0] != before[0], now[1] != before[1]
        if moved[0]:
            self.missed = 0 if moved[1] else self.missed + 1
        return moved

    def verify(self, encoder: nn.Module, aux: nn.Module) -> None:
        """Look once in each step of a model whose optimizers aren't known.

        Raises:
            RuntimeError: at the second update in a row that missed the decoder, unless frozen.
        """
        decoder = list(aux.parameters())
        if self._is_fused or not any(parameter.requires_grad for parameter in decoder):
            return
        encoder_moved, decoder_moved = self.look(encoder.parameters(), decoder)
        if decoder_moved:
            self._values = None
        if self._values is not None:
            # one weight of the encoder's is enough, and takes little memory
            one = [parameter for parameter in encoder.parameters() if parameter.requires_grad][:1]
            values = [[_own_part(p) for p in some] for some in (one, decoder)]
            self._compare(values, self._values, encoder_moved)
        if self.missed == 2:
            raise RuntimeError(_ADVICE)

    def _compare(
        self, values: list[list[Tensor]], before: list[list[Tensor]], encoder_moved: bool
    ) -> None:
        changed = [_differ(*pair) for pair in zip(values, before, strict=False)]
        if changed and changed[1]:
            self._is_fused, self._values, self.missed = True, None, 0
            return
        if changed and changed[0] and not encoder_moved:
            self._missed_by_value += 1
            # a learning rate of 0 leaves values as they are, too: no error
            if self._missed_by_value == 2:
                warnings.warn(f"recon_aux: {_ADVICE}", stacklevel=2)
        self._values = [[value.clone() for value in some] for some in values]


def watch_optimizer(
    optimizer: Any, decoder: Sequence[Tensor], encoders: Sequence[Tensor], *, joined: bool
) -> None:
    """Look before and after each step of one of torch's optimizers.

    Args:
        optimizer: of the encoders.
        decoder: the decoder's parameters in its groups.
        encoders: the encoders' parameters in its groups.
        joined: whether the decoder's were put there after the optimizer was made.
    """
    updates = DecoderUpdates()

    def before(*_: Any) -> None:
        updates.start(encoders, decoder)

    def after(stepped: Any, *_: Any) -> None:
        updates.look(encoders, decoder)
        trainable = [parameter for parameter in decoder if parameter.requires_grad]
        has_gradient = any(parameter.grad is not None for parameter in trainable)
        if updates.missed and joined and has_gradient:
            raise RuntimeError(
                "expected the optimizer to train the decoder, whose parameters joined the "
                f"encoder's in its groups, got a {type(stepped).__name__} that trains those alone "
                "that it was made of. In configure_optimizers list self.recon_aux.parameters() "
                "with them."
            )
        if updates.missed == 2 and trainable and not has_gradient:
            raise RuntimeError(
                "expected the attached training_step, which adds the reconstruction loss, before "
                "each step of the optimizer, saw two that changed the encoder past it. Replace "
                "training_step before attaching. Or take all off: recon_aux.detach(model)."
            )

    if decoder:
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


def version_of(parameters: Iterable[Tensor]) -> int:
    """Give a number that grows with each change of some parameters."""
    return sum(parameter._version for parameter in parameters)


def _own_part(parameter: Tensor) -> Tensor:
    """Give a parameter's values, of a sharded one those that this process has."""
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach()


def _differ(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    pairs = zip(some, others, strict=False)
    return any(
        x.shape != y.shape or x.device != y.device or not torch.equal(x, y) for x, y in pairs
    )
