"""How a view was coloured and blurred: statistics of its pixels."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from recon_aux.task.calibration import color_axes
from recon_aux.task.terms.prediction import PredictionTarget
from recon_aux.task.terms.shrinking import shrink

_OCTAVES = 3
# added to energies: those below it are noise
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
        # a side that can be halved for each octave
        side = max(1, images.shape[-1] >> _OCTAVES) << _OCTAVES
        images = shrink(images, side)
        colors = self.axes.mT.expand(len(images), -1, -1).bmm(images.flatten(2))
        squares = torch.baddbmm(colors.new_zeros(()), colors, colors.mT, alpha=1 / colors.shape[2])
        whole = squares.diagonal(dim1=1, dim2=2)
        by_norm = (whole + _FLOOR).rsqrt()
        one, other = _pairs(images.shape[1], images.device)
        correlations = (squares * by_norm[:, None] * by_norm[:, :, None])[:, one, other]
        means = colors.mean(dim=2)
        images = (colors - means[..., None]).view_as(images)
        norms = [torch.linalg.vector_norm(images, dim=(2, 3))]
        for _ in range(_OCTAVES):
            images = images[..., ::2, :].lerp(images[..., 1::2, :], 0.5)
            # twice the average: a quarter of the pixels then have the same sum of squares
            images = images[..., ::2] + images[..., 1::2]
            norms.append(torch.linalg.vector_norm(images, dim=(2, 3)))
        variances = (torch.stack(norms, dim=1) / side).square()
        # rounding may make it negative
        octaves = (variances[:, :-1] - variances[:, 1:]).clamp(min=0)
        energies = torch.cat([whole[:, None], octaves, variances[:, -1:]], dim=1)
        return torch.cat([means, correlations, (energies + _FLOOR).log().flatten(1)], dim=1)


# compiled code takes them as constants: tracing into the cached function would warn
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _pairs(channels: int, device: torch.device) -> Tensor:
    return _made_pairs(channels, device)


# a tensor that is made in inference mode can't be saved for a backward pass
@cache
@torch.inference_mode(False)
def _made_pairs(channels: int, device: torch.device) -> Tensor:
    return torch.triu_indices(channels, channels, offset=1, device=device)
