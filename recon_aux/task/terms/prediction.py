"""Telling what a view is like by a linear map of its equivariant part."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from recon_aux.task.calibration import Calibrated, mean_over_processes

# what is kept of the gradient of weights, at most, and of biases and norms
_OF_WEIGHTS, _OF_VECTORS = 0.1, 0.03


class _SlowNorm(nn.LayerNorm):
    """Layer norm whose own gradient is scaled down."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _slow(self.weight, _OF_VECTORS), _slow(self.bias, _OF_VECTORS)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class _SlowLinear(nn.Linear):
    """A linear layer whose own gradient is scaled down."""

    def forward(self, x: Tensor) -> Tensor:
        # the more numbers share in a mean, the less each counts
        pace = min(_OF_WEIGHTS, self.out_features / (8 * self.in_features))
        return F.linear(x, _slow(self.weight, pace), _slow(self.bias, _OF_VECTORS))


def _slow(parameter: Tensor, pace: float) -> Tensor:
    """Give a parameter as it is, with a part of its gradient."""
    return torch.lerp(parameter.detach(), parameter, pace)


class Readout(nn.Module):
    """A linear map of an equivariant part, normalised.

    A normalised feature is as long as it is wide, and the longer, the smaller the steps that a
    linear map of it bears. So gradients are scaled down: with SGD, and LARS, which leaves biases
    and norms to SGD, it then bears the rates that encoders do. AdamW's steps, and Adam's without
    weight decay, stay what they were, since they don't depend on the gradient's scale.

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
        self.norm = _SlowNorm(equivariant_dim, eps=1e-3)
        self.linear = _SlowLinear(equivariant_dim, count)
        nn.init.zeros_(self.linear.bias)

    def forward(self, equivariant: Tensor) -> Tensor:
        """``(B, E)``, any float type, -> ``(B, N)`` in float32."""
        read: Tensor = self.linear(self.norm(equivariant.to(self.linear.weight.dtype)))
        return read.float()


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
        >>> from recon_aux.task.terms.edges import Edges
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
