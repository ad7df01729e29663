"""Bring weights from an attached model to a bare one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attach import trained_encoder
from .find import unwrap


def strip(state: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the decoder, so that a bare model loads the rest strictly.

    Args:
        state: the ``state_dict`` of an attached model, of a wrapper of one, or a checkpoint that
            holds it as ``"state_dict"``, as Lightning's do.

    Returns:
        A new one without the decoder's entries; a checkpoint's others are as they were.

    Example:
        >>> sorted(strip({"backbone.weight": 1, "recon_aux.decoder.queries": 2}))
        ['backbone.weight']
    """
    if isinstance(state.get("state_dict"), Mapping):
        return {**state, "state_dict": strip(state["state_dict"])}
    return {key: value for key, value in state.items() if "recon_aux" not in key.split(".")}


def export_backbone(
    model: nn.Module, path: str | os.PathLike[str] | None = None, *, like: nn.Module | None = None
) -> dict[str, Tensor]:
    """Give the trained encoder's weights as a plain ``state_dict``, under its class's own names.

    Args:
        model: one that ``attach`` returned.
        path: where to save it, too, with ``torch.save``.
        like: a model of the architecture that is to load it strictly, torchvision's or timm's, say.
            An encoder that was cut from one, as ``Sequential(*resnet.children())[:-1]``, or stands
            in another module, gets its names back; what it lacks, a classifier, is ``like``'s own.

    Returns:
        The ``state_dict``, on the CPU. Where the encoder is sharded over processes, by FSDP2, each
        of them has to call this, and gets all of it.

    Raises:
        ValueError: if nothing is attached, or the encoder's weights aren't among ``like``'s.

    Example:
        >>> import recon_aux
        >>> from torchvision.models import resnet18
        >>> model = nn.ModuleDict({"encoder": nn.Sequential(*resnet18().children())[:-1],
        ...                        "head": nn.Linear(512, 8)})
        >>> model = recon_aux.attach(model, backbone="encoder", heads=["head"])
        >>> resnet18().load_state_dict(export_backbone(model, like=resnet18()))
        <All keys matched successfully>
    """
    encoder = unwrap(trained_encoder(model))
    state = {
        key.replace("_orig_mod.", ""): _whole(value)
        for key, value in encoder.state_dict().items()
        if isinstance(value, Tensor)
    }
    if like is not None:
        state = _renamed(state, {key: x.detach().cpu() for key, x in like.state_dict().items()})
    if path is not None:
        torch.save(state, path)
    return state


def _whole(value: Tensor) -> Tensor:
    """Copy to the CPU, together from all processes where it is sharded over them."""
    gather = getattr(value.detach(), "full_tensor", value.detach)
    whole: Tensor = gather()
    return whole.cpu().clone()


def _renamed(state: dict[str, Tensor], names: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name one model's tensors as another's, which is in it, or from which it was cut."""
    for found in (_within(state, names), dict(zip(names, state, strict=False))):
        fits = all(
            state[key].shape == names[name].shape and _last(key) == _last(name)
            for name, key in found.items()
        )
        if fits and len(found) in (len(state), len(names)):
            return {name: state[found[name]] if name in found else names[name] for name in names}
    raise ValueError(
        "expected like= of the encoder's architecture, whose weights begin "
        f"{_beginning(state)}, got {_beginning(names)}"
    )


def _within(state: dict[str, Tensor], names: dict[str, Tensor]) -> dict[str, str]:
    """Find the names with one prefix for all, that of the module within."""
    first = next(iter(names), "")
    prefixes = [key[: -len(first)] for key in state if f".{key}".endswith(f".{first}")]
    found = [{n: prefix + n for n in names if prefix + n in state} for prefix in prefixes]
    return max(found, key=len, default={})


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _beginning(state: dict[str, Tensor]) -> str:
    return ", ".join(f"{key} {tuple(x.shape)}" for key, x in list(state.items())[:3])
