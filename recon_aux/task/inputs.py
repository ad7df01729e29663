"""Check that views and features fit each other and the options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recon_aux.task.options import Options
from recon_aux.task.splitter import channel_dim


def check_views(
    views: Sequence[Tensor], features: Sequence[Tensor], options: Options, device: torch.device
) -> None:
    """Refuse views and features that no loss can be computed from.

    Args:
        views: must be two, each ``(B, image_channels, H, W)``.
        features: must be two, each with ``feature_dim`` channels; of the same shape, positions
            included, where both views are rebuilt.
        options: of the module that takes them.
        device: where all must be.

    Raises:
        ValueError: if there aren't two of each, or a shape or a device isn't as above.
        TypeError: if a view is complex or a feature isn't of a floating-point type.

    Example:
        >>> views, features = torch.rand(2, 4, 3, 8, 8), torch.rand(2, 4, 16)
        >>> check_views(views, features, Options(16), views.device)
        >>> check_views(views[:1], features, Options(16), views.device)
        Traceback (most recent call last):
        ...
        ValueError: expected two views and their two features, got 1 and 2. Pass two of each.
    """
    if len(views) != 2 or len(features) != 2:
        raise ValueError(
            f"expected two views and their two features, got {len(views)} and {len(features)}. "
            "Pass two of each."
        )
    tensors, channels = (*views, *features), options.image_channels
    shapes = [tuple(x.shape) for x in tensors]
    if any(len(s) != 4 or s[1] != channels or 0 in s[2:] for s in shapes[:2]):
        raise ValueError(
            f"expected views (B, {channels}, H, W), got {shapes[0]} and {shapes[1]}. Pass "
            "image_channels= if all views have another number of channels. Views of two kinds, as "
            "of 2 and of 3 bands, can't be rebuilt by one decoder: encode two of one kind."
        )
    for feature in features:
        channel_dim(feature, options.feature_dim)
        if 0 in feature.shape[1:]:
            raise ValueError(
                f"expected features with positions, got {tuple(feature.shape)}. Pass larger views "
                "to the encoder."
            )
    alike = options.reconstruct == "both"
    if features[0].ndim != features[1].ndim or (alike and shapes[2] != shapes[3]):
        raise ValueError(
            f"expected features of one shape, got {shapes[2]} and {shapes[3]}. Pass those of two "
            "views of one size."
        )
    if any(x.is_complex() for x in views) or not all(x.is_floating_point() for x in features):
        types = [str(x.dtype) for x in tensors]
        raise TypeError(
            f"expected real views and features of a floating-point type, got {types}. Pass "
            "view.real or feature.float()."
        )
    devices = [str(x.device) for x in tensors]
    if {*devices} != {str(device)}:
        raise ValueError(
            f"expected views, features and decoder on one device, got {devices} and {device}. "
            "Move them by .to(device)."
        )
    batches = [len(x) for x in tensors]
    if len({*batches}) != 1 or batches[0] == 0:
        raise ValueError(
            "expected two views of the same images and their features, got batches of "
            f"{batches[0]} and {batches[1]} views, {batches[2]} and {batches[3]} features. Pass as "
            "many of each, one or more."
        )
