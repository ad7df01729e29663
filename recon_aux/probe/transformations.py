"""The transformations whose parameters the probe predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import kornia
import torch
from torch import Tensor

from recon_aux.probe.inputs import as_floats, check_images

TRANSFORMATIONS: dict[str, tuple[float, float]] = {
    "rotation": (-30.0, 30.0),  # degrees
    "scale": (0.7, 1.3),
    "translation_x": (-0.2, 0.2),  # fractions of the width and height
    "translation_y": (-0.2, 0.2),
    "brightness": (0.6, 1.4),  # factors, as in torchvision's ColorJitter
    "contrast": (0.6, 1.4),
    "saturation": (0.4, 1.6),
    "hue": (-0.15, 0.15),  # fractions of the colour circle
    # standard deviation, a fraction of the width; cut off at 1.5 deviations of the strongest
    "blur": (0.003, 0.06),
}
"""Each parameter, and the range from which it is drawn uniformly."""

COMBINED = tuple(name for name in TRANSFORMATIONS if name != "blur")
"""The parameters of the combined transformation; they are drawn all at once."""


@dataclass(frozen=True)
class TransformationSet:
    """Transformations that the probe makes, and how their parameters are drawn.

    Attributes:
        ranges: each parameter, and the range from which it is drawn uniformly.
        alone: transformations that are made one at a time, and the parameters of each.
        combined: parameters that are drawn all at once; none if it is empty.
    """

    ranges: Mapping[str, tuple[float, float]]
    alone: Mapping[str, Sequence[str]]
    combined: Sequence[str] = ()

    @property
    def tasks(self) -> dict[str, Sequence[str]]:
        """The parameters of each transformation alone, and of ``"combined"`` if there is that."""
        return dict(self.alone) | ({"combined": self.combined} if self.combined else {})

    def draw(
        self, n: int, names: Sequence[str], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draw as :func:`draw_parameters` does, from the set's ranges."""
        return draw_parameters(n, names, generator=generator, ranges=self.ranges)


_PAPER = {
    "rotation": (-45.0, 45.0),
    "brightness": (0.6, 1.4),
    "contrast": (0.6, 1.4),
    "saturation": (0.6, 1.4),
    "hue": (-0.1, 0.1),
    "sigma": (0.1, 2.0),  # standard deviation of the blur, in pixels
    "translation_x": (-0.2, 0.2),
    "translation_y": (-0.2, 0.2),
}

_UNSEEN = {
    "shear": (-25.0, 25.0),  # degrees
    "perspective_x": (-0.3, 0.3),  # how much nearer the right and the lower edge are
    "perspective_y": (-0.3, 0.3),
    "occluder_x": (-0.35, 0.35),  # a grey square's place, from the middle, fractions of the side
    "occluder_y": (-0.35, 0.35),
    "noise": (0.0, 0.2),  # standard deviation
    "gamma": (0.5, 2.0),
    "red": (0.6, 1.4),  # a factor
    "upside_down": (0.0, 1.0),  # if it is above a half
}

SETS: dict[str, TransformationSet] = {
    "standard": TransformationSet(TRANSFORMATIONS, {n: (n,) for n in TRANSFORMATIONS}, COMBINED),
    "paper": TransformationSet(
        _PAPER,
        {
            "rotation": ("rotation",),
            "colour": ("brightness", "contrast", "saturation", "hue"),
            "blur": ("sigma",),
            "translation": ("translation_x", "translation_y"),
        },
    ),
    "unseen": TransformationSet(
        _UNSEEN,
        {
            "shear": ("shear",),
            "perspective": ("perspective_x", "perspective_y"),
            "occluder": ("occluder_x", "occluder_y"),
            "noise": ("noise",),
            "gamma": ("gamma",),
            "red": ("red",),
            "upside down": ("upside_down",),
        },
        tuple(_UNSEEN),
    ),
}
"""Sets of transformations, by name.

- ``"standard"``: those of :data:`TRANSFORMATIONS`, alone and combined.
- ``"paper"``: rotation, colour, blur and translation alone, with the ranges of Wang et al. (2025,
  arXiv 2503.18753). The range of the translation is ours.
- ``"unseen"``: what views are seldom made with. Shear, perspective, the place of an occluder,
  noise, gamma, the gain of the red channel and upside down, alone and combined.
"""

_NEUTRAL = dict.fromkeys(["scale", "brightness", "contrast", "saturation", "gamma", "red"], 1.0)


def draw_parameters(
    n: int,
    names: Sequence[str] = COMBINED,
    *,
    generator: torch.Generator | None = None,
    ranges: Mapping[str, tuple[float, float]] = TRANSFORMATIONS,
) -> dict[str, Tensor]:
    """Draw one value for each image and each named transformation.

    Args:
        n: number of images.
        names: keys of ``ranges``.
        generator: source of randomness, on the device of the result; the global one by default.
        ranges: the range of each parameter, as :class:`TransformationSet` has them.

    Returns:
        For each name a tensor ``(n,)``.

    Raises:
        ValueError: if a name is unknown.

    Example:
        >>> parameters = draw_parameters(5, ["rotation"])
        >>> bool((parameters["rotation"].abs() <= 30).all())
        True
    """
    unknown = set(names) - set(ranges)
    if unknown:
        raise ValueError(
            f"expected names among {list(ranges)}, got {sorted(unknown)}. Pass some of those."
        )
    device = None if generator is None else generator.device
    drawn = {}
    for name in names:
        low, high = ranges[name]
        drawn[name] = torch.rand(n, generator=generator, device=device) * (high - low) + low
    if "upside_down" in drawn:
        drawn["upside_down"] = drawn["upside_down"].round()
    return drawn


def transform(images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Transform images with kornia, each by its own parameters.

    Geometry comes first, then blur, then colour, then an occluder, then noise. The image is
    continued by its reflection, so no border reveals how far it moved.

    Args:
        images: ``(B, 3, H, W)``, uint8, or floats from 0 to 1.
        parameters: for any parameter of :data:`SETS` a tensor ``(B,)``; the others stay neutral.

    Returns:
        Images of the same shape and range.

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> transform(images, draw_parameters(2)).shape
        torch.Size([2, 3, 32, 32])
    """
    images = _checked(images)
    height, width = images.shape[-2:]

    def value(name: str) -> Tensor:
        neutral = torch.full((len(images),), _NEUTRAL.get(name, 0.0))
        return parameters.get(name, neutral).to(images)

    if "upside_down" in parameters:
        upside_down = value("upside_down")[:, None, None, None] > 0.5
        images = torch.where(upside_down, images.flip(-2), images)
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
    if parameters.keys() & {"shear", "perspective_x", "perspective_y"}:
        images = _tilt(
            images, *(value(name) for name in ("shear", "perspective_x", "perspective_y"))
        )
    if "blur" in parameters:
        sigma = (value("blur") * width)[:, None].expand(-1, 2)
        size = 2 * round(3 * TRANSFORMATIONS["blur"][1] * width / 2) + 1
        images = kornia.filters.gaussian_blur2d(images, (size, size), sigma)
    if "sigma" in parameters:
        images = kornia.filters.gaussian_blur2d(
            images, (13, 13), value("sigma")[:, None].expand(-1, 2)
        )
    for name, adjust in (
        ("brightness", kornia.enhance.adjust_brightness_accumulative),
        ("contrast", kornia.enhance.adjust_contrast_with_mean_subtraction),
        ("saturation", kornia.enhance.adjust_saturation_with_gray_subtraction),
    ):
        if name in parameters:
            images = adjust(images, value(name))
    if "hue" in parameters:
        images = kornia.enhance.adjust_hue(images, value("hue") * 2 * torch.pi)
    if "gamma" in parameters:
        images = images.clamp(min=0) ** value("gamma")[:, None, None, None]
    if "red" in parameters:
        gain = torch.stack([value("red"), *[torch.ones_like(value("red"))] * 2], dim=1)
        images = images * gain[:, :, None, None]
    if parameters.keys() & {"occluder_x", "occluder_y"}:
        images = torch.where(_square(images, value("occluder_x"), value("occluder_y")), 0.5, images)
    if "noise" in parameters:
        images = images + value("noise")[:, None, None, None] * _noise(images, value("noise"))
    return images.clamp(0, 1)


def _checked(images: Tensor) -> Tensor:
    """Give images as floats, and refuse those that aren't from 0 to 1."""
    # bytes always are; to look at a GPU's pixels would wait for it
    if images.dtype != torch.uint8 and images.device.type == "cpu":
        check_images(images)
    return as_floats(images)


def _tilt(images: Tensor, shear: Tensor, toward_x: Tensor, toward_y: Tensor) -> Tensor:
    """Shear images, and turn them out of the plane; both leave the middle where it is."""
    height, width = images.shape[-2:]
    # pixels from -1 to 1
    to_unit = kornia.geometry.normal_transform_pixel(height, width).to(images)
    matrix = torch.eye(3).to(images).repeat(len(images), 1, 1)
    matrix[:, 0, 1] = torch.tan(torch.deg2rad(shear))
    matrix[:, 2, 0], matrix[:, 2, 1] = -toward_x, -toward_y
    matrix = torch.linalg.inv(to_unit) @ matrix @ to_unit
    return kornia.geometry.warp_perspective(
        images, matrix, (height, width), padding_mode="reflection"
    )


def _square(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mark the pixels of a square, a quarter of the side wide, around each image's ``(x, y)``."""
    near = []
    for side, place in zip(images.shape[-2:], (y, x), strict=True):
        centers = (torch.arange(side, device=images.device) + 0.5) / side - 0.5
        near.append((centers - place[:, None]).abs() <= 1 / 8)
    return (near[0][:, :, None] & near[1][:, None, :])[:, None]


def _noise(images: Tensor, levels: Tensor) -> Tensor:
    """Draw each image's noise from its own level, so that it is the same in any batch."""
    drawn = []
    for seed in levels.float().cpu().view(torch.int32).tolist():
        generator = torch.Generator().manual_seed(seed)
        drawn.append(torch.randn(images.shape[1:], generator=generator))
    return torch.stack(drawn).to(images)
