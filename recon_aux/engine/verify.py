"""Check on a running step that the method's loss sees the invariant channels alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from recon_aux.engine.autograd import reached
from recon_aux.engine.hooks import EncoderCall, version


def trained_encoders(loss: Tensor, calls: Sequence[EncoderCall]) -> list[nn.Module]:
    """Say which encoders the method's loss trains."""
    trains = reached(loss, [call.output for call in calls])
    encoders = {
        id(c.encoder): c.encoder for c, trained in zip(calls, trains, strict=True) if trained
    }
    return list(encoders.values())


def past_masks(loss: Tensor, outputs: Sequence[Tensor], masked: Sequence[Tensor]) -> list[Tensor]:
    """Say which of the encoder's outputs the loss depends on past what the heads received."""
    masks: list[Node] = [x.grad_fn for x in masked if x.grad_fn is not None]
    past = reached(loss, outputs, avoiding=masks)
    return [output for output, is_past in zip(outputs, past, strict=True) if is_past]


def are_fed_by_others(masked: Sequence[Tensor]) -> bool:
    """Say whether some head received what another had made of what it received."""
    # outputs of one compiled function can't be told apart
    return any(any(reached(x, [y for y in masked if y.grad_fn is not x.grad_fn])) for x in masked)


def gradients_to(outputs: Sequence[Tensor], masked: Sequence[Tensor]) -> list[Tensor]:
    """Give what flows back from the heads' inputs, whatever the heads make of them.

    It stops at the encoder's outputs and runs nothing of the method's own backward pass, which in
    some methods can run once only.
    """
    masked = [x for x in masked if x.requires_grad]
    if not masked:
        return []
    generator = torch.Generator("cpu").manual_seed(0)
    flowing = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in masked]
    return gradients_of(masked, outputs, flowing)


def gradients_of(
    results: Sequence[Tensor], outputs: Sequence[Tensor], flowing: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Give the gradients of some results with respect to the encoder's outputs, where there are.

    None of what torch has compiled for one backward pass only.

    Raises:
        RuntimeError: if the graph can't be looked into.
    """
    try:
        gradients = torch.autograd.grad(
            results, outputs, flowing, retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        if "donated buffers" in str(error):
            # compiled for one backward pass
            return []
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "expected activation checkpointing with use_reentrant=False, got True, whose graph "
            "can't be looked into"
        ) from error
    return [gradient for gradient in gradients if gradient is not None]


_ADVICE = (
    "the optimizer to train the decoder with the encoder, whose weights alone were changed in the "
    "last two steps; make the optimizer after attaching, or "
    "optimizer.add_param_group({'params': model.recon_aux.parameters()})"
)


class TrainedTogether:
    """Sees to it that the decoder is trained where the encoder is."""

    def __init__(self) -> None:
        self.versions: tuple[int, int] | None = None
        self.steps_of_encoder_alone = 0
        # fused optimizers change no version: until the decoder's has grown, values are compared
        self.has_grown = self.was_changed = False
        self.values_alone = 0
        self.values: list[dict[int, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave the values out of copies."""
        return {**vars(self), "values": []}

    def verify(self, encoder: nn.Module, aux: nn.Module) -> None:
        """Count steps after which the encoder was changed and the decoder not, unless frozen.

        Raises:
            RuntimeError: at the second.
        """
        ours = [parameter for parameter in aux.parameters() if parameter.requires_grad]
        if self.was_changed or not ours:
            return
        versions, seen = (version(encoder), version(aux)), self.versions
        moved = [now != was for now, was in zip(versions, seen or versions, strict=True)]
        self.versions = versions
        self.has_grown |= moved[1]
        if self.has_grown:
            self.values = []
        else:
            # one weight of the encoder's tells, and takes little memory
            one = [parameter for parameter in encoder.parameters() if parameter.requires_grad][:1]
            values = [{id(p): _own_part(p) for p in some} for some in (one, ours)]
            if self.values:
                changed = [_differ(*some) for some in zip(values, self.values, strict=True)]
                self.was_changed = changed[1]
                self._tell(encoder_alone=changed[0] and not moved[0] and not changed[1])
            self.values = [] if self.was_changed else [_cloned(some) for some in values]
        if moved[0]:
            alone = not (moved[1] or self.was_changed)
            self.steps_of_encoder_alone = self.steps_of_encoder_alone + 1 if alone else 0
        if self.steps_of_encoder_alone == 2:
            raise RuntimeError(f"expected {_ADVICE}")

    def _tell(self, *, encoder_alone: bool) -> None:
        """Warn where only values tell, which a learning rate of 0 leaves as they are, too."""
        self.values_alone += encoder_alone
        if encoder_alone and self.values_alone == 2:
            warnings.warn(f"recon_aux: expected {_ADVICE}", stacklevel=2)


def _own_part(parameter: Tensor) -> Tensor:
    """Give a parameter's values, of a sharded one those that this process has."""
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach()


def _cloned(values: dict[int, Tensor]) -> dict[int, Tensor]:
    return {key: value.clone() for key, value in values.items()}


def _differ(some: dict[int, Tensor], others: dict[int, Tensor]) -> bool:
    pairs = [(x, others[key]) for key, x in some.items() if key in others]
    return any(
        x.shape != y.shape or x.device != y.device or not torch.equal(x, y) for x, y in pairs
    )
