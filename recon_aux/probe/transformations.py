"""The transformations whose parameters the probe predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import kornia
import torch
from torch import Tensor

TRANSFORMATIONS: dict[str, tuple[float, float]] = {
    "rotation": (-30.0, 30.0),  # degrees
    "scale": (0.7, 1.3),
    "translation_x": (-0.2, 0.2),  # fractions of the width and height
    "translation_y": (-0.2, 0.2),
    "brightness": (0.6, 1.4),  # factors, as in torchvision's ColorJitter
    "contrast": (0.6, 1.4),
    "saturation": (0.4, 1.6),
    "hue": (-0.15, 0.15),  # fractions of the colour circle
    "blur": (0.003, 0.06),  # standard deviation, a fraction of the width
}
"""Each parameter, and the range from which it is drawn uniformly."""

COMBINED = tuple(name for name in TRANSFORMATIONS if name != "blur")
"""The parameters of the combined transformation; they are drawn all at once."""

_NEUTRAL = {"scale": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}


def draw_parameters(
    n: int, names: Sequence[str] = COMBINED, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Draw one value for each image and each named transformation.

    Args:
        n: number of images.
        names: keys of :data:`TRANSFORMATIONS`.
        generator: source of randomness; the global one by default.

    Returns:
        For each name a tensor ``(n,)``.

    Raises:
        ValueError: if a name is unknown.

    Example:
        >>> parameters = draw_parameters(5, ["rotation"])
        >>> bool((parameters["rotation"].abs() <= 30).all())
        True
    """
    unknown = set(names) - set(TRANSFORMATIONS)
    if unknown:
        raise ValueError(
            f"expected names among {list(TRANSFORMATIONS)}, got {sorted(unknown)}. Pass some of "
            "those."
        )
    drawn = {}
    for name in names:
        low, high = TRANSFORMATIONS[name]
        drawn[name] = torch.rand(n, generator=generator) * (high - low) + low
    return drawn


def transform(images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Transform images with kornia, each by its own parameters.

    Geometry comes first, then blur, then colour. The image is continued by its reflection, so no
    border reveals how far it moved.

    Args:
        images: ``(B, 3, H, W)``, values from 0 to 1.
        parameters: for any of :data:`TRANSFORMATIONS` a tensor ``(B,)``; the others stay neutral.

    Returns:
        Images of the same shape and range.

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> transform(images, draw_parameters(2)).shape
        torch.Size([2, 3, 32, 32])
    """
    height, width = images.shape[-2:]

    def value(name: str) -> Tensor:
        neutral = torch.full((len(images),), _NEUTRAL.get(name, 0.0))
        return parameters.get(name, neutral).to(images)

    if parameters.keys() & {"rotation", "scale", "translation_x", "translation_y"}:
        matrix = kornia.geometry.get_affine_matrix2d(
            torch.stack([value("translation_x") * width, value("translation_y") * height], dim=1),
            images.new_tensor([[(width - 1) / 2, (height - 1) / 2]]).expand(len(images), 2),
            value("scale")[:, None].expand(-1, 2),
            value("rotation"),
        )
        images = kornia.geometry.warp_affine(
            images, matrix[:, :2], (height, width), padding_mode="reflection"
        )
    if "blur" in parameters:
        sigma = (value("blur") * width)[:, None].expand(-1, 2)
        size = 2 * round(3 * TRANSFORMATIONS["blur"][1] * width / 2) + 1
        images = kornia.filters.gaussian_blur2d(images, (size, size), sigma)
    for name, adjust in (
        ("brightness", kornia.enhance.adjust_brightness_accumulative),
        ("contrast", kornia.enhance.adjust_contrast_with_mean_subtraction),
        ("saturation", kornia.enhance.adjust_saturation_with_gray_subtraction),
    ):
        if name in parameters:
            images = adjust(images, value(name))
    if "hue" in parameters:
        images = kornia.enhance.adjust_hue(images, value("hue") * 2 * torch.pi)
    return images.clamp(0, 1)
