"""Build an encoder by the name of its architecture, and guess names from a checkpoint's tensors."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from math import isqrt
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from recon_aux.cli.errors import UserError

EXAMPLES = (
    "timm:resnet50, torchvision:vit_b_16, torchvision:resnet18-small or my_code:build_encoder"
)
"""What the value of ``--arch`` may look like."""

# ResNets' 3x3 stems for small images: the padding, and what follows the norm, which weights don't
# show. lightly's ResNet, cut as in its examples, loses the activation there.
_STEMS = {"-small": (1, nn.ReLU), "-solo": (2, nn.ReLU), "-lightly": (1, nn.Identity)}
SMALL_STEMS = tuple(_STEMS)
"""The ends of names of ResNets for small images."""

_RESNETS = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
_RESNETS += [f"wide_resnet{depth}_2" for depth in (50, 101)]
_RESNETS += [f"resnext{kind}" for kind in ("50_32x4d", "101_32x8d", "101_64x4d")]
_SIZES = ("tiny", "small", "base", "large")

# architectures that people train, by a part of their tensors' names
_LIKELY: dict[str, list[str]] = {
    "conv1.weight": [
        *(f"torchvision:{name}" for name in _RESNETS),
        *(f"timm:resnet{name}" for name in ("18d", "26", "26d", "34d", "50d", "101d", "50_gn")),
    ],
    "attn.qkv.": [
        *(f"timm:vit_{size}_patch16_224" for size in _SIZES),
        *(f"timm:vit_{size}_patch14_dinov2" for size in _SIZES[1:]),
        *(f"timm:vit_{size}_patch14_reg4_dinov2" for size in _SIZES[1:]),
        *(f"timm:vit_base_patch16_{kind}_224" for kind in ("clip", "siglip")),
        *(f"timm:vit_{size}_patch14_224" for size in ("huge", "giant")),
        *(f"timm:deit_{size}_distilled_patch16_224" for size in _SIZES[:-1]),
        *(f"torchvision:swin_{size}" for size in ("t", "s", "b")),
        *(f"timm:swin_{size}_patch4_window7_224" for size in _SIZES),
    ],
    "in_proj_weight": [
        f"torchvision:vit_{size}" for size in ("b_16", "b_32", "l_16", "l_32", "h_14")
    ],
    "layer_scale": [f"torchvision:convnext_{size}" for size in _SIZES],
    "conv_dw.": [
        *(f"timm:convnext_{size}" for size in ("atto", "femto", "pico", "nano", *_SIZES)),
        *(f"timm:efficientnet_{size}" for size in ("b0", "b1", "b2", "b3")),
        "timm:mobilenetv3_large_100",
    ],
    "fc1.": [f"torchvision:efficientnet_b{size}" for size in range(5)],
    "0.0.weight": [
        *(f"torchvision:{name}" for name in ("mobilenet_v2", "mobilenet_v3_large")),
        *(f"torchvision:{name}" for name in ("mobilenet_v3_small", "shufflenet_v2_x1_0")),
    ],
    "denselayer1.": [f"torchvision:densenet{depth}" for depth in (121, 169, 201)],
    "block1-0": [f"torchvision:regnet_y_{size}" for size in ("400mf", "800mf", "1_6gf")],
    "features.": [f"torchvision:vgg{depth}" for depth in ("11_bn", "16", "16_bn")],
}


def build(name: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Build an encoder with new weights, without its classifier.

    Args:
        name: as ``torchvision:resnet50``, ``timm:vit_small_patch16_224``, or, of one's own code,
            ``package.module:function``, which takes nothing and gives the encoder.
            ``torchvision:resnet18-small`` has a 3x3 stem of stride 1 and no pooling after it.
        options: more arguments, of torchvision's or timm's function.

    Raises:
        UserError: if there is no such architecture.

    Example:
        >>> build("torchvision:resnet18")(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 512])
    """
    library, _, model = name.partition(":")
    if not model:
        raise UserError(
            f"expected an architecture as {EXAMPLES}, got {name!r}. Pass --arch with one."
        )
    if library == "torchvision":
        return _torchvision(model, dict(options or {}))
    if library == "timm":
        return _timm(model, dict(options or {}))
    return _own(library, model)


def likely(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give names of architectures that a checkpoint may hold, and options to build them with."""
    small_stem = any(x.ndim == 4 and x.shape[1:] == (3, 3, 3) for x in tensors.values())
    stem = _stem(tensors)
    for hint, names in _LIKELY.items():
        if not any(hint in f".{name}" for name in tensors):
            continue
        for name in names:
            if name.startswith("timm:") and not _has_timm():
                continue
            if small_stem and name.removeprefix("torchvision:") in _RESNETS:
                yield f"{name}{stem}", {}
            yield name, options_of(name, tensors)


def options_of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the sizes that a vision transformer is built with; there are none for all others."""
    library, _, model = name.partition(":")
    is_vit = library in ("torchvision", "timm") and model.startswith(("vit", "deit"))
    return _sizes(tensors, library) if is_vit else {}


def _stem(tensors: Mapping[str, Tensor]) -> str:
    """Say whose 3x3 stem it is, by the names of layers and of what is next to the encoder."""
    names = [f".{name}" for name in tensors]
    if any(".shortcut." in name for name in names) and not any(".layer1." in x for x in names):
        return "-lightly"
    has_classifier = any(name.endswith(".classifier.weight") for name in names)
    return "-solo" if has_classifier and any(".projector." in x for x in names) else "-small"


def _sizes(tensors: Mapping[str, Tensor], library: str) -> dict[str, Any]:
    """Read a vision transformer's image size from its positions and patches."""
    positions = [x for key, x in tensors.items() if key.endswith(("pos_embed", "pos_embedding"))]
    patches = [
        x
        for key, x in tensors.items()
        if key.endswith(("patch_embed.proj.weight", "conv_proj.weight"))
    ]
    if not positions or not patches or positions[0].ndim != 3:
        return {}
    patch, count = patches[0].shape[-1], positions[0].shape[1]
    # with a class token, without, with one for distillation, too
    grids = [
        isqrt(count - extra) for extra in (1, 0, 2) if isqrt(count - extra) ** 2 == count - extra
    ]
    if not grids:
        return {}
    if library == "torchvision":
        return {"image_size": patch * grids[0]}
    return {"img_size": patch * grids[0], "patch_size": patch}


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    stem = next((stem for stem in _STEMS if name.endswith(stem)), "")
    base = name.removesuffix(stem)
    known = torchvision.models.list_models(torchvision.models)
    if base not in known or (stem and base not in _RESNETS):
        raise _unknown("torchvision", name, known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = torchvision.models.get_model(base, weights=None, **options)
    for last in ("fc", "classifier", "heads", "head"):
        if hasattr(model, last):
            setattr(model, last, nn.Identity())
    if stem:
        padding, activation = _STEMS[stem]
        model.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
        model.relu, model.maxpool = activation(), nn.Identity()
    return model


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    if not _has_timm():
        raise UserError(f"timm:{name} needs timm. Run: pip install timm")
    timm: Any = importlib.import_module("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    return model


def _has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


def _unknown(library: str, name: str, known: list[str]) -> UserError:
    similar = get_close_matches(name, known, n=3) or known[:3]
    return UserError(
        f"expected an architecture of {library}, got {library}:{name}, which it doesn't have. "
        f"Pass --arch {' or '.join(f'{library}:{found}' for found in similar)}."
    )


def _own(module: str, function: str) -> nn.Module:
    """Build the encoder by a function of the user's, found in the current folder, too."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"expected {module}:{function} to be a function that builds the encoder ({error}). "
            f"Pass --arch as {EXAMPLES}."
        ) from error
    model = found()
    if not isinstance(model, nn.Module):
        raise UserError(
            f"expected {module}:{function}() to give a torch.nn.Module, got "
            f"{type(model).__name__}. Pass --arch with a function that builds the encoder."
        )
    return model


def on_meta(name: str, options: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Give the names and shapes of an encoder's tensors, without memory for them.

    None if the architecture can't be built with these options.
    """
    try:
        try:
            with torch.device("meta"):
                return build(name, options).state_dict()
        except NotImplementedError:
            # it reads its own weights while it is built, as RegNet
            return build(name, options).state_dict()
    except (TypeError, ValueError, RuntimeError, AssertionError):
        return None
