"""What an encoder takes and returns: image channels, image size, the feature's width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recon_aux.task.contexts import evaluating
from recon_aux.task.splitter import as_feature, channel_dim

Features = Callable[[Any], Tensor]


class EncoderShape(NamedTuple):
    """Channels of the images, channels and rank of the features.

    The rank is 2 for ``(B, D)``, 3 for tokens ``(B, N, D)``, 4 for a map ``(B, D, H, W)``.
    """

    image_channels: int
    feature_dim: int
    feature_rank: int


def image_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Find the images that an encoder is called with. A mask of patches may come first.

    Raises:
        ValueError: if there are none.
    """
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    image = next((x for x in tensors if x.ndim == 4), None)
    if image is None:
        raise ValueError(
            "expected the encoder to be called with images (B, C, H, W), got "
            f"{[tuple(x.shape) for x in tensors]}. Pass backbone=: the module that takes images."
        )
    return image


def take_feature(output: Any, features: Features | None = None) -> Tensor:
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
            f"expected the encoder to return a tensor, got {_describe(feature)}. "
            "Pass features=lambda output: ..., which takes the feature from it."
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
    """Encode one blank image, in eval mode and without gradient, to see the feature's shape.

    Batch-norm statistics and the random state stay as they are.

    Args:
        encoder: images -> features.
        method: the encoder's method that takes them.
        image_channels: channels of the image; by default what the first convolution takes.
        image_size: side of the blank image, or its height and width; by default what an attribute
            of the encoder says, or else 64.
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
            f"got {method!r}. Pass the name of the method that the training step calls."
        )
    convolutions = (m for m in encoder.modules() if isinstance(m, nn.Conv2d))
    channels = image_channels or next((m.in_channels for m in convolutions), 3)
    size = image_size or _declared_image_size(encoder) or 64
    like = next(encoder.parameters(), torch.empty(0))
    height, width = (size, size) if isinstance(size, int) else size
    blank = torch.zeros(1, channels, height, width, device=like.device, dtype=like.dtype)
    try:
        drawn = torch.random.fork_rng(devices=[like.device] if like.is_cuda else [])
        with evaluating(encoder), drawn, torch.no_grad():
            output = call(blank)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ValueError(
            f"expected an encoder that takes images {tuple(blank.shape)}, but {error}. "
            "Pass image_size= and image_channels= of the images that it takes."
        ) from error
    feature = as_feature(take_feature(output, features))
    return EncoderShape(channels, feature.shape[channel_dim(feature)], feature.ndim)


def _declared_image_size(encoder: nn.Module) -> int | tuple[int, int] | None:
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
