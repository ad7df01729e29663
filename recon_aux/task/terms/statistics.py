"""How a view was coloured and blurred: statistics of its pixels."""

from __future__ import annotations

from functools import cache

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
        colors = self.axes.mT.expand(len(images), -1, -1).bmm(images.flatten(2))
        squares = torch.baddbmm(colors.new_zeros(()), colors, colors.mT, alpha=1 / colors.shape[2])
        whole = squares.diagonal(dim1=1, dim2=2)
        by_norm = (whole + _FLOOR).rsqrt()
        one, other = _pairs(images.shape[1], images.device)
        correlations = (squares * by_norm[:, None] * by_norm[:, :, None])[:, one, other]
        images, energies = colors.view_as(images), [whole]
        for _ in range(_OCTAVES):
            coarse = F.adaptive_avg_pool2d(images, max(1, images.shape[-1] // 2))
            fine = images - F.interpolate(coarse, images.shape[-2:], mode="nearest")
            energies.append(fine.square().mean(dim=(2, 3)))
            images = coarse
        energies.append(images.var(dim=(2, 3), correction=0))
        logarithms = (torch.cat(energies, dim=1) + _FLOOR).log()
        return torch.cat([colors.mean(dim=2), correlations, logarithms], dim=1)


# compiled code keeps them, and doesn't look into a cached function without a warning
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _pairs(channels: int, device: torch.device) -> Tensor:
    return _made_pairs(channels, device)


# a tensor that is made in inference mode can't be saved for a backward pass
@cache
@torch.inference_mode(False)
def _made_pairs(channels: int, device: torch.device) -> Tensor:
    return torch.triu_indices(channels, channels, offset=1, device=device)
