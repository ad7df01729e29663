"""How a view was coloured and blurred: statistics of its pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recon_aux.task.calibration import color_axes
from recon_aux.task.terms.prediction import PredictionTarget

_OCTAVES = 3
# of energies; below it they are noise
_FLOOR = 1e-4


class Statistics(PredictionTarget):
    """How an image's pixels vary. A reconstruction misses this where it is smooth.

    Along each principal axis of colour: the mean (brightness, tint), the logarithm of the mean
    square (along axes of chroma: saturation), and of the energy in each octave of spatial frequency
    (contrast, sharpness). For each pair of axes: the correlation (hue). Not in Wang, Krajsek &
    Scharr.

    Args:
        channels: C.

    Example:
        >>> Statistics(3)(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 21])
    """

    axes: Tensor

    def __init__(self, channels: int) -> None:
        count = channels * (_OCTAVES + 3) + channels * (channels - 1) // 2
        super().__init__(count, units=count)
        self.register_buffer("axes", torch.eye(channels, dtype=torch.float32))

    def _measure(self, images: Tensor) -> bool:
        colors = color_axes(images)
        if colors is None:
            return False
        self.axes.copy_(colors[2])
        return super()._measure(images)

    def plain(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, N)``: means, correlations, energies."""
        images = torch.einsum("cd,bchw->bdhw", self.axes, images)
        numbers = [images.mean(dim=(2, 3)), _correlations(images), _log_energies(images)]
        for _ in range(_OCTAVES):
            coarse = F.adaptive_avg_pool2d(images, max(1, images.shape[-1] // 2))
            fine = images - F.interpolate(coarse, images.shape[-2:], mode="nearest")
            numbers.append(_log_energies(fine))
            images = coarse
        numbers.append(_log_energies(images - images.mean(dim=(2, 3), keepdim=True)))
        return torch.cat(numbers, dim=1)


def _log_energies(images: Tensor) -> Tensor:
    return (images.square().mean(dim=(2, 3)) + _FLOOR).log()


def _correlations(images: Tensor) -> Tensor:
    """Return the cosine similarity of each pair of channels, ``(B, C * (C - 1) / 2)``."""
    flat = images.flatten(2)
    flat = flat * (flat.square().sum(dim=2, keepdim=True) + _FLOOR * flat.shape[2]).rsqrt()
    channels = images.shape[1]
    one, other = torch.triu_indices(channels, channels, offset=1, device=images.device)
    return (flat @ flat.mT)[:, one, other]
