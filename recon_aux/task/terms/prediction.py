"""Predict numbers that describe a view, by a linear map of its equivariant part."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from recon_aux.task.calibration import Calibrated
from recon_aux.task.distributed import mean_over_processes

# factors of gradients: of weights, at most, and of biases and norms
_OF_WEIGHTS, _OF_VECTORS = 0.1, 0.03


class _SlowNorm(nn.LayerNorm):
    """Layer norm whose parameters get a scaled-down gradient."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (_scale_gradient(p, _OF_VECTORS) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class _SlowLinear(nn.Linear):
    """A linear layer whose parameters get a scaled-down gradient."""

    def forward(self, x: Tensor) -> Tensor:
        # the loss is a mean: the more numbers are predicted, the smaller each one's gradient
        factor = min(_OF_WEIGHTS, self.out_features / (8 * self.in_features))
        weight = _scale_gradient(self.weight, factor)
        return F.linear(x, weight, _scale_gradient(self.bias, _OF_VECTORS))


def _scale_gradient(parameter: Tensor, factor: float) -> Tensor:
    """Return a parameter as it is, with its gradient multiplied by a factor."""
    return torch.lerp(parameter.detach(), parameter, factor)


class LinearReadout(nn.Module):
    """A linear map of an equivariant part, which is normalised first.

    The gradients of its parameters are scaled down. A normalised feature has the length
    sqrt(E), and the longer it is, the smaller the steps must be under which a linear map stays
    stable. With scaled gradients the map is stable at the encoder's learning rate under SGD, and
    under LARS, which trains biases and norms by SGD. Steps of AdamW, and of Adam without weight
    decay, stay the same: they don't depend on the gradient's scale.

    Args:
        equivariant_dim: E, channels of the equivariant part.
        count: N, how many numbers to predict.

    Example:
        >>> LinearReadout(128, 6)(torch.rand(4, 128)).shape
        torch.Size([4, 6])
    """

    def __init__(self, equivariant_dim: int, count: int) -> None:
        super().__init__()
        # with a large epsilon, features that are all zero get hardly a gradient
        self.norm = _SlowNorm(equivariant_dim, eps=1e-3)
        self.linear = _SlowLinear(equivariant_dim, count)
        nn.init.zeros_(self.linear.bias)

    def forward(self, equivariant: Tensor) -> Tensor:
        """Map ``(B, E)``, any float type, to ``(B, N)`` in float32."""
        read: Tensor = self.linear(self.norm(equivariant.to(self.linear.weight.dtype)))
        return read.float()


class PredictionTarget(Calibrated):
    """Numbers that describe an image, standardised by their spread over the first batch.

    Args:
        count: N, how many numbers describe an image.
        units: number of units. Consecutive numbers share a unit: one mean and one deviation.
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
        """Describe images, ``(B, C, H, W)`` -> ``(B, N)``, in float32, before standardising."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Describe images by standardised numbers. The first call sets the units.

        Args:
            images: ``(B, C, H, W)`` in float32.

        Returns:
            ``(B, N)`` in float32, clipped to four standard deviations; zeros until a batch has
            images that differ.
        """
        self._calibrate(images)
        if not self.calibrated:
            return images.new_zeros(len(images), self.count)
        return ((self._by_unit(images) - self.middle) / self.spread).clamp(-4, 4).flatten(1)

    def _by_unit(self, images: Tensor) -> Tensor:
        return rearrange(self.plain(images), "b (u n) -> b u n", u=len(self.middle))

    def _measure(self, images: Tensor) -> bool:
        numbers = self._by_unit(images)
        middle = mean_over_processes(numbers.mean(dim=(0, 2)), len(numbers))[:, None]
        square = (numbers - middle).square().mean(dim=(0, 2))
        spread = mean_over_processes(square, len(numbers)).sqrt()[:, None]
        if not (torch.isfinite(spread).all() and spread.max() > 1e-3):
            return False
        self.middle.copy_(middle)
        # a small first batch may vary less than later ones
        self.spread.copy_(spread.clamp(min=0.3))
        return True


class PredictionTerm(nn.Module):
    """Predict a view's numbers by a linear map of its equivariant part.

    Args:
        equivariant_dim: E, channels of the equivariant part.
        target: what to predict.

    Example:
        >>> from recon_aux.task.terms.edges import Edges
        >>> features, images = torch.rand(4, 128), torch.rand(4, 3, 32, 32)
        >>> PredictionTerm(128, Edges())(features, images).shape
        torch.Size([])
    """

    def __init__(self, equivariant_dim: int, target: PredictionTarget) -> None:
        super().__init__()
        # the attribute's name is a key of checkpoints
        self.told = target
        self.readout = LinearReadout(equivariant_dim, target.count)

    def forward(self, equivariant: Tensor, images: Tensor) -> Tensor:
        """Compare the prediction with the views' own numbers.

        Args:
            equivariant: of the views, ``(B, E)``.
            images: the views, ``(B, C, H, W)`` in float32.

        Returns:
            The mean squared error, a float32 scalar. Predicting the mean gives about 1, if the
            first batch was like the later ones.
        """
        return F.mse_loss(self.readout(equivariant), self.told(images))
