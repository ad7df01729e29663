"""How was the view coloured and blurred? Telling its statistics from its equivariant part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scale import Calibrated, color_axes, mean_over_processes

_OCTAVES = 3
# of energies, below which they are noise
_FLOOR = 1e-4


class Statistics(nn.Module):
    """Tell, by a linear map of its equivariant part, normalised, how a view's pixels vary.

    What is told, along each principal axis of colour: the mean, the logarithm of the mean square
    (along axes of chroma, saturation) and of the energy in each octave of spatial frequency
    (contrast, sharpness); and of each two axes the correlation (hue). A reconstruction with a small
    squared error is smooth, so a decoder alone is never asked for these.

    Not in Wang, Krajsek & Scharr; statistics of the image as a target are those of Wei et al.,
    "Masked Feature Prediction", CVPR 2022, which takes histograms of gradients.

    Args:
        equivariant_dim: E, channels of the equivariant part.
        channels: C, of the views.

    Example:
        >>> features, images = torch.rand(2, 4, 128), torch.rand(2, 4, 3, 32, 32)
        >>> Statistics(128, 3)(features, images).shape
        torch.Size([])
    """

    def __init__(self, equivariant_dim: int, channels: int) -> None:
        super().__init__()
        self.target = ImageStatistics(channels)
        # of features that have died, hardly a gradient
        self.norm = nn.LayerNorm(equivariant_dim, eps=1e-3)
        self.tell = nn.Linear(equivariant_dim, self.target.count)

    def forward(self, equivariant: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
        """Compare what is told with what is.

        Args:
            equivariant: of the views, each ``(B, E)``.
            images: the views, each ``(B, C, H, W)`` in float32.

        Returns:
            The mean squared error, a float32 scalar; 1 is what telling the mean gives.
        """
        part = torch.cat(list(equivariant))
        told = self.tell(self.norm(part.to(self.tell.weight.dtype))).float()
        return F.mse_loss(told, self.target(torch.cat(list(images))))


class ImageStatistics(Calibrated):
    """Statistics of images, in units of their spread over the first batch.

    Args:
        channels: C.

    Example:
        >>> ImageStatistics(3)(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 21])
    """

    axes: Tensor
    middle: Tensor
    spread: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.count = channels * (_OCTAVES + 3) + channels * (channels - 1) // 2
        self.register_buffer("axes", torch.eye(channels, dtype=torch.float32))
        self.register_buffer("middle", torch.zeros(self.count, dtype=torch.float32))
        self.register_buffer("spread", torch.ones(self.count, dtype=torch.float32))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, count)``, both in float32; the first call sets the units.

        Zeros as long as images are blank; what is far out is cut off at four times the spread.
        """
        self._calibrate(images)
        if not self.calibrated:
            return torch.zeros(len(images), self.count, device=images.device)
        return ((self._plain(images) - self.middle) / self.spread).clamp(-4, 4)

    def _measure(self, images: Tensor) -> bool:
        colors = color_axes(images)
        if colors is None:
            return False
        self.axes.copy_(colors[2])
        told = self._plain(images)
        self.middle.copy_(mean_over_processes(told.mean(dim=0), len(told)))
        square = (told - self.middle).square().mean(dim=0)
        # what hardly varies in the first batch, which may be small, may yet
        self.spread.copy_(mean_over_processes(square, len(told)).sqrt().clamp(min=0.3))
        return True

    def _plain(self, images: Tensor) -> Tensor:
        images = torch.einsum("cd,bchw->bdhw", self.axes, images)
        told = [images.mean(dim=(2, 3)), _correlations(images), _log_energies(images)]
        for _ in range(_OCTAVES):
            coarse = F.adaptive_avg_pool2d(images, max(1, images.shape[-1] // 2))
            fine = images - F.interpolate(coarse, images.shape[-2:], mode="nearest")
            told.append(_log_energies(fine))
            images = coarse
        told.append(_log_energies(images - images.mean(dim=(2, 3), keepdim=True)))
        return torch.cat(told, dim=1)


def _log_energies(images: Tensor) -> Tensor:
    return (images.square().mean(dim=(2, 3)) + _FLOOR).log()


def _correlations(images: Tensor) -> Tensor:
    """Tell how alike each two channels are, from -1 to 1: their cosine."""
    flat = images.flatten(2)
    flat = flat * (flat.square().sum(dim=2, keepdim=True) + _FLOOR * flat.shape[2]).rsqrt()
    channels = images.shape[1]
    one, other = torch.triu_indices(channels, channels, offset=1, device=images.device)
    return (flat @ flat.mT)[:, one, other]
