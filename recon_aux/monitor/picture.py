"""A labelled picture: two views, the first rebuilt, and rebuilt in another image's context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = ("view", "other view", "rebuilt", "rebuilt in another\nimage's context")
_SIDE, _GAP, _TITLE = 128, 4, 34


def inverse_of(normalize: Callable[[Tensor], Tensor] | None, like: Tensor) -> Any:
    """Give the function that undoes a normalisation of each channel, by what it does to 0 and 1."""
    if normalize is None:
        return lambda images: images
    black, white = (normalize(torch.full_like(like[:1], value)) for value in (0.0, 1.0))
    low, scale = black.mean((2, 3), keepdim=True), (white - black).mean((2, 3), keepdim=True)
    return lambda images: (images - low) / scale


def draw_picture(columns: list[Tensor]) -> Any:
    """Put images side by side, one column for each of :data:`COLUMNS`.

    Args:
        columns: each ``(B, C, H, W)``, from 0 to 1.

    Returns:
        A ``PIL.Image``.

    Example:
        >>> draw_picture([torch.rand(2, 3, 8, 8)] * 4).size
        (532, 302)
    """
    from PIL import Image, ImageDraw  # noqa: PLC0415

    rows, step = len(columns[0]), _SIDE + _GAP
    size = (_GAP + step * len(columns), _GAP + _TITLE + step * rows)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for place, (title, images) in enumerate(zip(COLUMNS, columns, strict=True)):
        left = _GAP + place * step
        draw.multiline_text((left, _GAP), title, fill="black")
        for row, pixels in enumerate(_as_pixels(images)):
            tile = Image.fromarray(pixels.numpy())
            picture.paste(tile, (left, _GAP + _TITLE + row * step))
    return picture


def _as_pixels(images: Tensor) -> Tensor:
    """Give the first three channels as bytes, ``(B, H, W, 3)``, all of one size."""
    images = images.detach().float().cpu().nan_to_num().clamp(0, 1)
    images = images.repeat(1, 3, 1, 1) if images.shape[1] < 3 else images
    grows = min(images.shape[-2:]) < _SIDE
    how: dict[str, Any] = {"mode": "nearest"} if grows else {"mode": "bilinear", "antialias": True}
    resized = F.interpolate(images[:, :3], (_SIDE, _SIDE), **how)
    return (resized * 255).round().to(torch.uint8).movedim(1, -1).contiguous()
