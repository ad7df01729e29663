"""What is refused: options out of range, views and features that don't belong together."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from recon_aux.task.splitter import channel_dim


def check_nonnegative(option: str, value: Any) -> None:
    """Refuse what is no finite number of 0 or more.

    Raises:
        ValueError: that names the option.

    Example:
        >>> check_nonnegative("weight", -1)
        Traceback (most recent call last):
        ...
        ValueError: expected weight= as a finite number of 0 or more, got -1
    """
    if not isinstance(value, Real) or not 0 <= float(value) < float("inf"):
        raise ValueError(f"expected {option}= as a finite number of 0 or more, got {value!r}")


def check_views(
    views: Sequence[Tensor],
    features: Sequence[Tensor],
    *,
    image_channels: int,
    feature_dim: int,
    alike: bool,
    device: torch.device,
) -> None:
    """Refuse what no loss can be made of.

    Args:
        views: to be two, each ``(B, image_channels, H, W)``.
        features: to be two, each with ``feature_dim`` channels.
        image_channels: that the views are to have.
        feature_dim: that the features are to have.
        alike: both features are to have the same shape, positions included.
        device: where all are to be.

    Raises:
        ValueError: if there aren't two of each, or a shape isn't as above, or a device is another.
        TypeError: if a view is complex or a feature isn't of a floating-point type.

    Example:
        >>> views, features = torch.rand(2, 4, 3, 8, 8), torch.rand(2, 4, 16)
        >>> own = {"image_channels": 3, "feature_dim": 16, "device": views.device}
        >>> check_views(views, features, alike=True, **own)
        >>> check_views(views[:1], features, alike=True, **own)
        Traceback (most recent call last):
        ...
        ValueError: expected two views and their two features, got 1 and 2
    """
    if len(views) != 2 or len(features) != 2:
        raise ValueError(
            f"expected two views and their two features, got {len(views)} and {len(features)}"
        )
    given = (*views, *features)
    shapes = [tuple(x.shape) for x in given]
    if any(len(s) != 4 or s[1] != image_channels or 0 in s[2:] for s in shapes[:2]):
        raise ValueError(
            f"expected views (B, {image_channels}, H, W), got {shapes[0]} and {shapes[1]};"
            " image_channels= tells how many channels they have"
        )
    for feature in features:
        channel_dim(feature, feature_dim)
        if 0 in feature.shape[1:]:
            raise ValueError(f"expected features with positions, got {tuple(feature.shape)}")
    ranks = {x.ndim for x in features}
    if len(ranks) > 1 or (alike and len(set(shapes[2:])) > 1):
        raise ValueError(f"expected features of one shape, got {shapes[2]} and {shapes[3]}")
    if any(x.is_complex() for x in views) or not all(x.is_floating_point() for x in features):
        raise TypeError(
            "expected real views and features of a floating-point type, got "
            f"{[str(x.dtype) for x in given]}"
        )
    devices = {str(x.device) for x in given} | {str(device)}
    if len(devices) > 1:
        raise ValueError(
            "expected views, features and the decoder on one device, got "
            f"{[str(x.device) for x in given]} and {device}"
        )
    batches = [len(x) for x in given]
    if len(set(batches)) != 1 or batches[0] == 0:
        raise ValueError(
            "expected two views of the same images and their features, got batches of "
            f"{batches[0]} and {batches[1]} views, {batches[2]} and {batches[3]} features"
        )
