"""Find the function that encodes images as in training, and use it without side effects."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recon_aux.engine.api import attachment_of, is_attached
from recon_aux.engine.drivers import has_training_step
from recon_aux.engine.encoder import channel_places, take_feature
from recon_aux.engine.modules import averaged, describe_children, unwrap
from recon_aux.probe.inputs import checked_output
from recon_aux.task.contexts import evaluating
from recon_aux.task.splitter import as_feature

ENCODERS = ("backbone", "encoder", "online_backbone", "student_backbone")
"""Where a bare model has its encoder."""

# a model with a submodule of such a name returns a head's output, not a feature
_HEADS = ("projec", "predict")


def without_wrapper(model: nn.Module) -> nn.Module:
    """Look through compiled, parallel and averaged models."""
    return unwrap(averaged(unwrap(model)))


def find_call(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Find what encodes images.

    Args:
        model: attached, or with a submodule of :data:`ENCODERS`.

    Returns:
        A function of images that returns the feature that the task gets: ``attach``'s options
        count. None if there is no encoder of these names.
    """
    if not is_attached(model):
        bare = _bare_encoder(model)
        return None if bare is None else lambda images: feature_of(bare, as_input(bare, images))
    attached = attachment_of(model)
    encoder, method = attached.trained_encoder, attached.backbone_method
    call = encoder if method == "forward" else getattr(encoder, method)
    features, dim = attached.recorder.features, attached.recorder.shape.channel_dim
    spatial = bool(attached.aux.options["spatial"])
    return lambda images: as_feature(
        take_feature(call(as_input(model, images)), features, dim), spatial=spatial
    )


def call_of(name: str, model: Any) -> Any:
    """Give what encodes images: a model's encoder, or else the model itself.

    Raises:
        ValueError: if the model has a head or a training step, so that it is no encoder itself.
    """
    if not isinstance(model, nn.Module):
        return model
    found = find_call(model)
    has_head = any(_is_head(model, *child) for child in model.named_children())
    if found is None and (has_head or has_training_step(model, "training_step")):
        raise ValueError(
            f"expected an encoder, or a model whose encoder is one of {ENCODERS}, got {name!r}, a "
            f"{type(model).__name__} with {describe_children(model)}. Pass its encoder alone; "
            "or, if all of it is the encoder, lambda images: model(images)."
        )
    return found or model


def _is_head(model: nn.Module, name: str, child: nn.Module) -> bool:
    """Whether a submodule is named as a head, and doesn't take the images."""
    images = _fewest_channels(model)
    takes_images = images is not None and _fewest_channels(child) == images
    return any(part in name for part in _HEADS) and not takes_images


def equivariant_dim_of(model: Any) -> int:
    """Give how many of the feature's last channels are equivariant: 0 if nothing is attached."""
    if not isinstance(model, nn.Module) or not is_attached(model):
        return 0
    return attachment_of(model).aux.splitter.equivariant_dim


def as_input(encoder: Any, images: Tensor) -> Tensor:
    """Give images the type and the device of an encoder's weights."""
    weights = encoder.parameters() if isinstance(encoder, nn.Module) else ()
    like = next((x for x in weights if x.is_floating_point()), images)
    return images.to(like)


def _bare_encoder(model: nn.Module) -> nn.Module | None:
    """Find the submodule that takes the images: a transformer's blocks may be named encoder."""
    found = (getattr(model, name, None) for name in ENCODERS)
    modules = (module for module in found if isinstance(module, nn.Module))
    return next((x for x in modules if _fewest_channels(x) == _fewest_channels(model)), None)


def feature_of(encode: Any, images: Tensor, *, spatial: bool = False) -> Tensor:
    """Encode images, and put the channels of a map where they usually are."""
    output = checked_output(encode(images))
    places = channel_places(images, output) if output.ndim == 4 else []
    dim = places[0] if len(places) == 1 else None
    return as_feature(take_feature(output, dim=dim), spatial=spatial)


def _fewest_channels(module: nn.Module) -> int | None:
    """Give the fewest channels that a convolution takes: those of images."""
    taken = (x.in_channels for x in module.modules() if isinstance(x, nn.Conv2d))
    return min(taken, default=None)


@contextmanager
def evaluating_encoder(encoder: Any) -> Iterator[None]:
    """Put an encoder into eval mode, or each module that an encoding function calls."""
    if isinstance(encoder, nn.Module):
        with evaluating(encoder):
            yield
        return
    with ExitStack() as stack:

        def put(called: nn.Module, _: Any) -> None:
            trains = (part.training for part in called.modules())
            if not torch.compiler.is_compiling() and any(trains):
                stack.enter_context(evaluating(called))

        stack.enter_context(nn.modules.module.register_module_forward_pre_hook(put))
        yield


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Leave a model's modes, a running step and the random states as they are."""
    if not isinstance(model, nn.Module):
        with torch.no_grad():
            yield
        return
    driver = attachment_of(model).driver if is_attached(model) else None
    step = None if driver is None else driver.step
    device = next(model.parameters(), torch.empty(0)).device
    no_autocast = torch.autocast(device.type, enabled=False)
    try:
        if driver is not None:
            driver.step = None
        with evaluating(model), _random_state_kept(device), no_autocast, torch.no_grad():
            yield
    finally:
        if driver is not None:
            driver.step = step


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Set the random states of torch, numpy and Python back afterwards."""
    own, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)
