"""Bring weights from an attached model to a bare one."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recon_aux.engine.api import attachment_of
from recon_aux.engine.modules import averaged, uncompiled, unwrap


def strip(state: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the decoder, so that a bare model loads the rest strictly.

    Args:
        state: the ``state_dict`` of an attached model, of a wrapper of one, or a checkpoint that
            holds some, as Lightning's do.

    Returns:
        A new one without the decoder's weights; a checkpoint's other entries are as they were.

    Raises:
        TypeError: if it is something else.

    Example:
        >>> state = {"backbone.weight": torch.ones(2), "recon_aux.decoder.queries": torch.ones(3)}
        >>> strip(state)
        {'backbone.weight': tensor([1., 1.])}
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"expected a state_dict, as torch.load(path) gives it, got {type(state).__name__}. "
            "Pass that."
        )
    # a copy of a state_dict keeps the versions of its modules
    stripped = copy.copy(state) if isinstance(state, dict) else dict(state)
    for key, value in state.items():
        if _is_ours(key, value):
            del stripped[key]
        elif isinstance(value, Mapping) and _holds_ours(value):
            stripped[key] = strip(value)
    return stripped


def _holds_ours(state: Mapping[str, Any]) -> bool:
    """Whether a decoder's weights are anywhere in a checkpoint's entry."""
    return any(
        _is_ours(key, value) or (isinstance(value, Mapping) and _holds_ours(value))
        for key, value in state.items()
    )


def _is_ours(key: Any, value: Any) -> bool:
    return "recon_aux" in str(key).split(".") and _holds_tensors(value)


def _holds_tensors(value: Any) -> bool:
    values = value.values() if isinstance(value, Mapping) else ()
    return isinstance(value, Tensor) or any(map(_holds_tensors, values))


def export_backbone(
    model: nn.Module, path: str | os.PathLike[str] | None = None, *, like: nn.Module | None = None
) -> dict[str, Tensor]:
    """Give the trained encoder's weights as a plain ``state_dict``, under its class's own names.

    Args:
        model: one that ``attach`` returned, or an average of its weights.
        path: where to save it, too, with ``torch.save``.
        like: a model that is to load the weights strictly, such as torchvision's or timm's. They
            get its names, also if the encoder holds such a model, or was cut from one, as
            ``Sequential(*resnet.children())[:-1]``. Others, a classifier's, are ``like``'s own.

    Returns:
        The ``state_dict``, on the CPU. Where the encoder is sharded over processes, by FSDP2, each
        of them has to call this, and gets all of it.

    Raises:
        ValueError: if nothing is attached, or ``like`` is of another architecture.
        TypeError: if ``like`` is no model.
        FloatingPointError: if the last loss was not finite.

    Example:
        >>> import recon_aux
        >>> from torchvision.models import resnet18
        >>> model = nn.ModuleDict({"encoder": nn.Sequential(*resnet18().children())[:-1],
        ...                        "head": nn.Linear(512, 8)})
        >>> model = recon_aux.attach(model, backbone="encoder", heads=["head"])
        >>> resnet18().load_state_dict(export_backbone(model, like=resnet18()))
        <All keys matched successfully>
    """
    attached = attachment_of(averaged(unwrap(model)))
    attached.aux.finite_check.flush()
    encoder = unwrap(attached.trained_encoder)
    state = {
        uncompiled(key): _whole(value)
        for key, value in encoder.state_dict().items()
        if isinstance(value, Tensor)
    }
    if like is not None and not isinstance(like, nn.Module):
        raise TypeError(f"expected like= as a model, got {like!r}. Build the model first.")
    if like is not None:
        state = _renamed(state, {key: _whole(x) for key, x in like.state_dict().items()})
    if path is not None:
        torch.save(state, path)
    return state


def _whole(value: Tensor) -> Tensor:
    """Copy to the CPU, together from all processes where it is sharded over them."""
    gather = getattr(value.detach(), "full_tensor", value.detach)
    whole: Tensor = gather()
    return whole.cpu().clone()


def _renamed(state: dict[str, Tensor], names: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give an encoder's tensors the names of a model that it was cut from, or that it holds."""
    found = pair_names(state, names)
    if found is None:
        raise ValueError(
            f"expected like= of the encoder's architecture, whose {len(state)} tensors are "
            f"{_extent(state)}, got {len(names)}, {_extent(names)}. Pass like= a model that has "
            "the encoder's layers."
        )
    if lost := sorted(state.keys() - found.values()):
        warnings.warn(
            f"recon_aux: expected like= to have all that the encoder has, saw {len(lost)} tensors "
            f"that it hasn't, as {lost[0]}. They are left out, and like='s features differ. Pass "
            "like= of the architecture that was trained.",
            stacklevel=3,
        )
    return {name: state[found[name]] if name in found else x for name, x in names.items()}


def pair_names(state: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Map keys of ``names`` to keys of the same tensors in ``state``; None if they don't fit."""
    first = next(iter(names), "")
    # either all names have one prefix more, or they differ and the order is the same
    prefixes = [key[: -len(first)] for key in state if f".{key}".endswith(f".{first}")]
    within = [
        {name: prefix + name for name in names if prefix + name in state} for prefix in prefixes
    ]
    for found in (*within, dict(zip(names, state, strict=False))):
        fits = all(
            state[key].shape == names[name].shape and key.split(".")[-1] == name.split(".")[-1]
            for name, key in found.items()
        )
        # a whole top-level module may be missing, as a classifier, but no single layer
        known = {part.split(".")[0] for pair in found.items() for part in pair}
        lacking = [key for key in names if key not in found]
        lacking += [key for key in state if key not in found.values()]
        if found and fits and not known & {key.split(".")[0] for key in lacking}:
            return found
    return None


def _extent(state: dict[str, Tensor]) -> str:
    keys = list(state)
    return " ... ".join(f"{key} {tuple(state[key].shape)}" for key in (keys[0], keys[-1]))
