"""Say in words what recon_aux found in a model: its encoder, heads and views."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from recon_aux.engine.api import attachment_of
from recon_aux.engine.attachment import Attachment
from recon_aux.engine.modules import share_weights


def summary(model: nn.Module) -> str:
    """Say what was found in a model, to be printed and read once.

    Print it after the first step: only then the views are known, and which encoder is trained.

    Args:
        model: one that ``attach`` returned.

    Returns:
        A few lines: the encoder and its feature, the heads that see the invariant part alone,
        momentum encoders, the views, the weight, and the decoder.

    Raises:
        ValueError: if nothing is attached.

    Example:
        >>> import recon_aux, torch
        >>> model = nn.ModuleDict({"encoder": nn.Conv2d(3, 8, 16), "head": nn.Flatten()})
        >>> model = recon_aux.attach(model, backbone="encoder", heads=["head"], image_size=16)
        >>> z0, z1 = (model["head"](model["encoder"](x)) for x in torch.rand(2, 4, 3, 16, 16))
        >>> loss = recon_aux.add_loss(model, (z0 - z1).square().mean())
        >>> for line in recon_aux.summary(model).splitlines()[:4]:
        ...     print(line)
        encoder: encoder (Conv2d), 4 invariant and 4 equivariant channels
        heads that see the invariant part alone: head (Flatten)
        momentum encoders: none
        views: 4 images of 3x16x16, each view in a call of its own
    """
    attached = attachment_of(model)
    aux, encoder = attached.aux, attached.trained_encoder
    copies = (x for x in attached.encoders if not share_weights(x, encoder))
    count = sum(parameter.numel() for parameter in aux.parameters())
    lines = {
        "encoder": f"{_named(attached, [encoder])}, {aux.splitter.invariant_dim} invariant and "
        f"{aux.splitter.equivariant_dim} equivariant channels",
        "heads that see the invariant part alone": _named(attached, attached.heads),
        "momentum encoders": _named(attached, copies),
        "views": _views(attached),
        "weight": "set by the first batch" if aux.weight_is_due else f"{aux.weight:g}",
        "decoder": f"{count:,} parameters with the other terms'",
    }
    return "\n".join(f"{name}: {text}" for name, text in lines.items())


def _named(attached: Attachment, modules: Iterable[nn.Module]) -> str:
    """List modules by their names in the model, with their classes."""
    found = (f"{attached.name(module)} ({type(module).__name__})" for module in modules)
    return ", ".join(found) or "none"


def _views(attached: Attachment) -> str:
    """Say how many images the views had in the first step, and in which calls they came."""
    plan = attached.plan
    if plan is None or not plan.shape:
        return "not known before the first step"
    count, *sides = plan.shape
    came = "each view in a call of its own"
    if plan.other_is_momentum:
        came = "the other view from a call without gradient"
    elif plan.joined:
        came = f"several views in one call, {'in turns' if plan.interleaved else 'one by one'}"
    return f"{count} images of {'x'.join(map(str, sides))}, {came}"
