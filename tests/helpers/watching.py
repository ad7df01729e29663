"""See what an attached model does, by public hooks and by what stays alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import Tensor, nn

from recon_aux import ReconAuxOutput
from recon_aux.task.splitter import as_feature


def rebuilt_from(model: Any) -> list[Any]:
    """What the ReconAux gets, from here on: views and features."""
    seen: list[Any] = []

    def note(aux: Any, args: Any) -> None:
        views, features = args
        seen.append((views, [as_feature(y, spatial=aux.decoder.spatial) for y in features]))

    model.recon_aux.register_forward_pre_hook(note)
    return seen


def rebuilt_by(model: Any) -> list[ReconAuxOutput]:
    """What the ReconAux gives, from here on."""
    outputs: list[ReconAuxOutput] = []
    model.recon_aux.register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


def calls_of(module: nn.Module) -> list[Any]:
    """Grows with each call of a module."""
    calls: list[Any] = []
    module.register_forward_hook(lambda *call: calls.append(None))
    return calls


def seen_by(module: nn.Module, *, outputs: bool = False) -> list[weakref.ref[Tensor]]:
    """Remember weakly what a module takes and gives, or the latter alone."""
    references: list[weakref.ref[Tensor]] = []

    def remember(module: nn.Module, args: Any, output: Tensor) -> None:
        seen = [output] if outputs else [args[0], output]
        references.extend(weakref.ref(x) for x in seen)

    module.register_forward_hook(remember)
    return references


def alive(references: list[weakref.ref[Tensor]]) -> int:
    """How many of some tensors anything still holds."""
    gc.collect()
    return sum(reference() is not None for reference in references)
