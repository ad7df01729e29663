"""Check what the probe and the monitor are given: images from 0 to 1, and what normalises them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_images(images: Tensor) -> None:
    """Refuse images that aren't uint8, or floats from 0 to 1.

    Raises:
        ValueError: if they are of another kind, or beyond 0 and 1.

    Example:
        >>> check_images(torch.full((1, 3, 2, 2), 255.0))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: expected images as uint8 or as floats from 0 to 1, got ... Divide them by 255.
    """
    if images.dtype == torch.uint8 or not images.numel():
        return
    low, high = (float(x) for x in images.aminmax())
    # resizing may overshoot a little
    if images.is_floating_point() and low > -0.1 and high < 1.1:
        return
    if low < 0:
        advice = "Leave Normalize out of their transform, and pass it as normalize=."
    elif images.is_floating_point():
        advice = "Divide them by 255."
    else:
        advice = "Pass images.to(torch.uint8)."
    raise ValueError(
        f"expected images as uint8 or as floats from 0 to 1, got {images.dtype} from {low:.4g} to "
        f"{high:.4g}. {advice}"
    )


def check_normalize(normalize: Any) -> None:
    """Refuse means and deviations where a function of images is expected.

    Raises:
        TypeError: if it can't be called.

    Example:
        >>> check_normalize(torch.nn.Identity())
    """
    if normalize is not None and not callable(normalize):
        raise TypeError(
            f"expected normalize= as a function of images, got {type(normalize).__name__}. Pass "
            "normalize=torchvision.transforms.Normalize(mean, std)."
        )
