"""Telling what a view is like by a linear map of its equivariant part."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scale import Calibrated, color_axes, mean_over_processes


class Readout(nn.Module):
    """A linear map of an equivariant part, normalised.

    Args:
        equivariant_dim: E, channels of the equivariant part.
        count: N, how many numbers to read.

    Example:
        >>> Readout(128, 6)(torch.rand(4, 128)).shape
        torch.Size([4, 6])
    """

    def __init__(self, equivariant_dim: int, count: int) -> None:
        super().__init__()
        # of features that have died, hardly a gradient
        self.norm = nn.LayerNorm(equivariant_dim, eps=1e-3)
        self.linear = nn.Linear(equivariant_dim, count)
        nn.init.zeros_(self.linear.bias)

    def forward(self, equivariant: Tensor) -> Tensor:
        """``(B, E)``, any float type, -> ``(B, N)`` in float32."""
        read: Tensor = self.linear(self.norm(equivariant.to(self.linear.weight.dtype)))
        return read.float()


class Told(Calibrated):
    """What is to be told of images, in units of its spread over the first batch.

    Args:
        count: N, of numbers that describe an image.
    """

    middle: Tensor
    spread: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.register_buffer("middle", torch.zeros(count, dtype=torch.float32))
        self.register_buffer("spread", torch.ones(count, dtype=torch.float32))

    @abstractmethod
    def plain(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, N)``, both in float32, before units."""

    def is_fit(self, images: Tensor) -> bool:
        """Whether the first batch may set units; what else it sets is set here."""
        return color_axes(images) is not None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, N)``, both in float32; the first call sets the units.

        Zeros as long as images are blank; what is far out is cut off at four times the spread.
        """
        self._calibrate(images)
        if not self.calibrated:
            return torch.zeros(len(images), self.count, device=images.device)
        return ((self.plain(images) - self.middle) / self.spread).clamp(-4, 4)

    def _measure(self, images: Tensor) -> bool:
        if not self.is_fit(images):
            return False
        told = self.plain(images)
        self.middle.copy_(mean_over_processes(told.mean(dim=0), len(told)))
        square = (told - self.middle).square().mean(dim=0)
        # what hardly varies in the first batch, which may be small, may yet
        self.spread.copy_(mean_over_processes(square, len(told)).sqrt().clamp(min=0.3))
        return True


class Telling(nn.Module):
    """Tell something of each view by a linear map of its equivariant part.

    Args:
        equivariant_dim: E, channels of the equivariant part.
        told: what is to be told.

    Example:
        >>> from recon_aux.edges import Edges
        >>> features, images = torch.rand(2, 4, 128), torch.rand(2, 4, 3, 32, 32)
        >>> Telling(128, Edges())(features, images).shape
        torch.Size([])
    """

    def __init__(self, equivariant_dim: int, told: Told) -> None:
        super().__init__()
        self.told = told
        self.readout = Readout(equivariant_dim, told.count)

    def forward(self, equivariant: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
        """Compare what is told with what is.

        Args:
            equivariant: of the views, each ``(B, E)``.
            images: the views, each ``(B, C, H, W)`` in float32.

        Returns:
            The mean squared error, a float32 scalar; 1 is what telling the mean gives.
        """
        read = self.readout(torch.cat(list(equivariant)))
        return F.mse_loss(read, self.told(torch.cat(list(images))))
