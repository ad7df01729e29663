"""Telling what a view is like by a linear map of its equivariant part."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .scale import Calibrated, mean_over_processes

# what is kept of a readout's gradient: this over its width, and at most that
_PACE, _FASTEST = 4.0, 0.1


class Readout(nn.Module):
    """A linear map of an equivariant part, normalised.

    A normalised feature is as long as it is wide, and the longer, the smaller the steps that a
    linear map of it bears. So its gradients are scaled down by the width: with SGD, and LARS, which
    leaves biases and norms to SGD, it then bears the rates that encoders do. Adam's steps stay what
    they were, since they don't depend on the gradient's scale.

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
        norm, linear, width = self.norm, self.linear, self.norm.normalized_shape
        pace = min(_FASTEST, _PACE / linear.in_features)
        scale, shift, weight, bias = (
            # the parameter's own value, to the bit
            torch.lerp(parameter.detach(), parameter, pace)
            for parameter in (norm.weight, norm.bias, linear.weight, linear.bias)
        )
        normalized = F.layer_norm(equivariant.to(weight.dtype), width, scale, shift, norm.eps)
        return F.linear(normalized, weight, bias).float()


class Told(Calibrated):
    """What is to be told of images, in units of its spread over the first batch.

    Args:
        count: N, of numbers that describe an image.
        units: of how many units; as many numbers, one after the other, share each.
    """

    middle: Tensor
    spread: Tensor

    def __init__(self, count: int, units: int) -> None:
        super().__init__()
        self.count = count
        self.register_buffer("middle", torch.zeros(units, 1, dtype=torch.float32))
        self.register_buffer("spread", torch.ones(units, 1, dtype=torch.float32))

    @abstractmethod
    def plain(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, N)``, both in float32, before units."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, N)``, both in float32; the first call sets the units.

        Zeros as long as images are all alike; what is far out is cut off at four times the spread.
        """
        self._calibrate(images)
        if not self.calibrated:
            return images.new_zeros(len(images), self.count)
        return ((self._by_unit(images) - self.middle) / self.spread).clamp(-4, 4).flatten(1)

    def _by_unit(self, images: Tensor) -> Tensor:
        return rearrange(self.plain(images), "b (u n) -> b u n", u=len(self.middle))

    def _measure(self, images: Tensor) -> bool:
        told = self._by_unit(images)
        middle = mean_over_processes(told.mean(dim=(0, 2)), len(told))[:, None]
        square = (told - middle).square().mean(dim=(0, 2))
        spread = mean_over_processes(square, len(told)).sqrt()[:, None]
        if not (torch.isfinite(spread).all() and spread.max() > 1e-3):
            return False
        self.middle.copy_(middle)
        # what hardly varies in the first batch, which may be small, may yet
        self.spread.copy_(spread.clamp(min=0.3))
        return True


class Telling(nn.Module):
    """Tell something of each view by a linear map of its equivariant part.

    Args:
        equivariant_dim: E, channels of the equivariant part.
        told: what is to be told.

    Example:
        >>> from recon_aux.edges import Edges
        >>> features, images = torch.rand(4, 128), torch.rand(4, 3, 32, 32)
        >>> Telling(128, Edges())(features, images).shape
        torch.Size([])
    """

    def __init__(self, equivariant_dim: int, told: Told) -> None:
        super().__init__()
        self.told = told
        self.readout = Readout(equivariant_dim, told.count)

    def forward(self, equivariant: Tensor, images: Tensor) -> Tensor:
        """Compare what is told with what is.

        Args:
            equivariant: of the views, ``(B, E)``.
            images: the views, ``(B, C, H, W)`` in float32.

        Returns:
            The mean squared error, a float32 scalar; telling the mean gives about 1, if the first
            batch was like the rest.
        """
        return F.mse_loss(self.readout(equivariant), self.told(images))
