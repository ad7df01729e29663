"""What an encoder takes and returns: image channels, image size, the feature's width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recon_aux.engine.autograd import reached
from recon_aux.engine.step import tensors_in
from recon_aux.task.splitter import as_feature, channel_dim

Features = Callable[[Any], Tensor]

# names under which encoders keep the width of their features
_WIDTHS = ("num_features", "embed_dim", "hidden_size", "hidden_dim")

_ONLY_IMAGES = (
    "Only 2-D images can be rebuilt, no volumes, clips or signals. Pass backbone=: the module that "
    "takes images (B, C, H, W)."
)


class EncoderShape(NamedTuple):
    """Channels of the images; channels, rank and channels' dimension of the features.

    The rank is 2 for ``(B, D)``, 3 for tokens ``(B, N, D)``, 4 for a map ``(B, D, H, W)``. The
    dimension is that of the encoder's own output, as 3 where a map has its channels last.
    """

    image_channels: int
    feature_dim: int
    feature_rank: int
    channel_dim: int


def image_of(args: tuple[Any, ...], kwargs: dict[str, Any], channels: int) -> Tensor:
    """Find the images that an encoder is called with. A mask or coordinates may come first.

    Raises:
        ValueError: if there are none, or several and none has these channels.
    """
    tensors = list(tensors_in([args, kwargs]))
    images = [x for x in tensors if x.ndim == 4]
    shapes = [tuple(x.shape) for x in images or tensors]
    if not images:
        raise ValueError(
            f"expected the encoder to be called with images (B, C, H, W), got {shapes}. "
            f"{_ONLY_IMAGES}"
        )
    # torch 2.6 compiles no next() with a default
    image = ([x for x in images if x.shape[1] == channels] or images)[0]
    if image.shape[3] <= 4 < min(image.shape[1:3]):
        raise ValueError(
            f"expected images (B, C, H, W), got {shapes}, whose channels are last. Move them in "
            "the training step, images.movedim(-1, 1), and let the encoder take (B, C, H, W)."
        )
    if len(images) > 1 and image.shape[1] != channels:
        raise ValueError(
            f"expected images of {channels} channels, got {shapes}. Pass image_channels= of those "
            "that are to be rebuilt."
        )
    return image


def take_feature(output: Any, features: Features | None = None, dim: int | None = None) -> Tensor:
    """Take the feature out of what an encoder returned.

    Args:
        output: a tensor, or anything that ``features`` takes one from.
        features: takes the feature from the output.
        dim: of its channels; by default where they usually are.

    Raises:
        TypeError: if there is no tensor.
    """
    try:
        feature = output if features is None else features(output)
    except Exception as error:
        raise TypeError(
            f"expected features= to take the feature from {_describe(output)}, but it raised "
            f"{type(error).__name__}: {error}. Pass a function that takes it from there. If the "
            "training step calls the encoder with more than images, pass example_input=, too."
        ) from error
    if not isinstance(feature, Tensor) or feature.ndim not in (2, 3, 4):
        raise TypeError(
            "expected the encoder to return a tensor (B, D), (B, N, D) or (B, D, H, W), got "
            f"{_describe(feature)}. Pass features=lambda output: ..., which takes such a feature "
            "from it."
        )
    usual = channel_dim(feature)
    return feature if dim in (None, usual) else feature.movedim(dim, usual)


def source_of(feature: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Give the one of these tensors that a feature was made of, or else the feature itself."""
    if not feature.requires_grad or any(x is feature for x in tensors):
        return feature
    if torch.compiler.is_compiling():
        return tensors[0]
    return (reached(feature, tensors) or [feature])[0]


def encoder_shape(
    encoder: nn.Module,
    *,
    method: str = "forward",
    image_channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    features: Features | None = None,
    example_input: Any = None,
    widths: Sequence[int] = (),
) -> EncoderShape:
    """Encode one blank image, without gradient, to see the feature's shape.

    The random state stays as it is. In eval mode, which the caller sets, so do all statistics.

    Args:
        encoder: images -> features.
        method: the encoder's method that takes them.
        image_channels: channels of the image; by default what the first convolution takes.
        image_size: side of the blank image, or its height and width; by default what an attribute
            of the encoder says, or else 64.
        features: takes the feature from what the encoder returns.
        example_input: is encoded in place of the blank image: a tensor, a tuple of arguments, or a
            dict of keyword arguments.
        widths: that the heads take, which tell channels from positions.

    Returns:
        The shape.

    Raises:
        ValueError: if the encoder doesn't accept the blank image, or nothing shows which dimension
            of the feature holds its channels.

    Example:
        >>> encoder = nn.Sequential(nn.Conv2d(1, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> encoder_shape(encoder)
        EncoderShape(image_channels=1, feature_dim=16, feature_rank=2, channel_dim=1)
    """
    call = getattr(encoder, method, None)
    if not callable(call):
        raise ValueError(
            f"expected backbone_method= to name a method of {type(encoder).__name__}, "
            f"got {method!r}. Pass the name of the method that the training step calls."
        )
    args, kwargs = _call_of(call, example_input)
    expected: Any = image_channels or getattr(_first_conv(encoder), "in_channels", 3)
    if example_input is None:
        args = (_blank(encoder, expected, image_size),)
    image = image_of(args, kwargs, expected)

    def encode(*args: Any, **kwargs: Any) -> Any:
        drawn = torch.random.fork_rng(devices=[image.device] if image.is_cuda else [])
        with drawn, torch.no_grad():
            return call(*args, **kwargs)

    try:
        output = encode(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"expected an encoder that takes images {tuple(image.shape)}, but it raised "
            f"{type(error).__name__}: {error}. Pass image_size= and image_channels= of the images "
            "that it takes. If it is called with more than images, pass example_input=: a tuple "
            f"of what it is called with, or a dict of keyword arguments. {_ONLY_IMAGES}"
        ) from error

    def larger() -> Tensor | None:
        with suppress(Exception):
            return take_feature(encode(image.repeat(1, 1, 2, 2)), features)
        return None

    feature = take_feature(output, features)
    clues = _places_of_channels(encoder, image, feature, widths, larger)
    usual = None if feature.ndim > 2 and features is None else channel_dim(feature)
    dim = next((places[0] for places in clues if len(places) == 1), usual)
    if dim is None:
        is_map = feature.ndim == 4
        as_it_is, other = ("first", "last") if is_map else ("last", "first")
        raise ValueError(
            f"expected an output that shows where its channels are, got {tuple(feature.shape)}. If "
            f"they come {as_it_is}, {'(B, D, H, W)' if is_map else '(B, N, D)'}, pass "
            f"features=lambda output: output. If they come {other}, pass "
            f"features=lambda output: output.movedim({'-1, 1' if is_map else '1, -1'})."
        )
    feature = as_feature(take_feature(feature, dim=dim))
    width = feature.shape[channel_dim(feature)]
    return EncoderShape(image_channels or image.shape[1], width, feature.ndim, dim)


def _call_of(call: Any, example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_input, dict):
        with suppress(TypeError):
            signature(call).bind(**example_input)
            return (), example_input
    return example_input if isinstance(example_input, tuple) else (example_input,), {}


def _first_conv(encoder: nn.Module) -> Any:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return next((m for m in encoder.modules() if isinstance(m, kinds)), None)


def _blank(encoder: nn.Module, channels: int, size: int | tuple[int, int] | None) -> Tensor:
    first = _first_conv(encoder)
    if isinstance(first, (nn.Conv1d, nn.Conv3d)):
        raise ValueError(
            f"expected an encoder of images (B, C, H, W), got {type(encoder).__name__}, which "
            f"begins with a {type(first).__name__}. {_ONLY_IMAGES} If it does take images, pass "
            "example_input=: what the training step calls it with."
        )
    size = size or declared_image_size(encoder) or 64
    height, width = (size, size) if isinstance(size, int) else size
    like = next(encoder.parameters(), torch.empty(0))
    return torch.zeros(1, channels, height, width, device=like.device, dtype=like.dtype)


def _places_of_channels(
    encoder: nn.Module,
    image: Tensor,
    feature: Tensor,
    widths: Sequence[int],
    larger: Callable[[], Tensor | None],
) -> Iterator[list[int]]:
    """Give the dimensions of a feature that may hold its channels, by one clue after another."""
    shape, places = feature.shape, sorted({1, feature.ndim - 1})
    if feature.ndim == 4:
        yield channel_places(image, feature)
    sources = (encoder, getattr(encoder, "config", None))
    declared = [getattr(source, name, None) for source in sources for name in _WIDTHS]
    yield [dim for dim in places if shape[dim] in declared]
    yield [dim for dim in places if shape[dim] in widths]
    # channels are as many for a larger image
    other = larger() if len(places) > 1 else None
    yield [dim for dim in places if other is not None and other.shape[dim] == shape[dim]]


def channel_places(image: Tensor, feature: Tensor) -> list[int]:
    """Give a map's dimensions that may hold channels: positions keep the image's proportions."""
    (height, width), shape = image.shape[-2:], feature.shape
    off = {1: shape[2] * width - shape[3] * height, 3: shape[1] * width - shape[2] * height}
    return [dim for dim, far in off.items() if abs(far) < max(height, width)]


def declared_image_size(encoder: nn.Module) -> int | tuple[int, int] | None:
    """Give the one image size that an encoder says it takes: its side, or height and width."""
    for module in encoder.modules():
        for name in ("img_size", "image_size"):
            size = getattr(module, name, None)
            if isinstance(size, int):
                return size
            if isinstance(size, (tuple, list)) and [type(side) for side in size] == [int, int]:
                return size[0], size[1]
    return None


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {[_describe(v) for v in value]}"
    if isinstance(value, dict):
        return f"dict of { ({k: _describe(v) for k, v in value.items()}) }"
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
