"""What an encoder takes and gives: its image channels, its image size, its feature's width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recon_aux.task.splitter import as_feature, channel_dim
from recon_aux.task.temporary import evaluating

Features = Callable[[Any], Tensor]


class EncoderShape(NamedTuple):
    """Channels of the images, channels and rank of the features.

    The rank is 2 for ``(B, D)``, 3 for tokens ``(B, N, D)``, 4 for a map ``(B, D, H, W)``.
    """

    image_channels: int
    feature_dim: int
    feature_rank: int


def take_tensor(output: Any, features: Features | None = None) -> Tensor:
    """Take the feature out of what an encoder returned, as the very tensor that is in there.

    Args:
        output: a tensor, or anything that ``features`` takes one from.
        features: takes the feature from the output.

    Raises:
        TypeError: if there is no tensor.
    """
    try:
        feature = output if features is None else features(output)
    except Exception as error:
        raise TypeError(
            f"expected features= to take the feature from {_describe(output)}, but it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(feature, Tensor):
        raise TypeError(
            f"expected the encoder to return a tensor, got {_describe(feature)}; "
            "features=lambda output: ... tells how to take the feature from it"
        )
    return feature


def encoder_shape(
    encoder: nn.Module,
    *,
    method: str = "forward",
    image_channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    features: Features | None = None,
) -> EncoderShape:
    """Find out by one forward of a blank image, in eval mode and without gradient.

    Batch-norm statistics and the random state stay as they are.

    Args:
        encoder: images -> features.
        method: the encoder's method that takes them.
        image_channels: where the encoder's first convolution doesn't show it.
        image_size: side of the blank image, or its height and width, where the encoder accepts one
            size alone and no attribute of it says which.
        features: takes the feature from what the encoder returns.

    Returns:
        The shape.

    Raises:
        ValueError: if the encoder doesn't accept the blank image.

    Example:
        >>> encoder = nn.Sequential(nn.Conv2d(1, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> encoder_shape(encoder)
        EncoderShape(image_channels=1, feature_dim=16, feature_rank=2)
    """
    call = getattr(encoder, method, None)
    if not callable(call):
        raise ValueError(
            f"expected backbone_method= to name a method of {type(encoder).__name__}, "
            f"got {method!r}"
        )
    channels = image_channels or _first_conv_channels(encoder)
    size = image_size or _declared_image_size(encoder) or 64
    like = next(encoder.parameters(), torch.empty(0))
    height, width = (size, size) if isinstance(size, int) else size
    blank = torch.zeros(1, channels, height, width, device=like.device, dtype=like.dtype)
    try:
        with evaluating(encoder), _undrawn(like.device), torch.no_grad():
            output = call(blank)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ValueError(
            f"expected an encoder that takes images {tuple(blank.shape)}, but {error}; "
            "image_size= and image_channels= tell what it takes"
        ) from error
    feature = as_feature(take_tensor(output, features))
    return EncoderShape(channels, feature.shape[channel_dim(feature)], feature.ndim)


def _first_conv_channels(encoder: nn.Module) -> int:
    convolutions = (m for m in encoder.modules() if isinstance(m, nn.Conv2d))
    first = next(convolutions, None)
    return 3 if first is None else first.in_channels


def _declared_image_size(encoder: nn.Module) -> int | tuple[int, int] | None:
    for module in encoder.modules():
        for name in ("img_size", "image_size"):
            size = getattr(module, name, None)
            if isinstance(size, int):
                return size
            if isinstance(size, (tuple, list)) and [type(side) for side in size] == [int, int]:
                return size[0], size[1]
    return None


@contextmanager
def _undrawn(device: torch.device) -> Iterator[None]:
    """Leave the random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {[_describe(v) for v in value]}"
    if isinstance(value, dict):
        return f"dict of { ({k: _describe(v) for k, v in value.items()}) }"
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
