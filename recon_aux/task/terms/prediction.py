"""Predict numbers that describe a view, by a linear map of its equivariant part."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from recon_aux.task.calibration import Calibrated
from recon_aux.task.distributed import mean_over_processes

# factors of gradients: of weights, at most, and of biases and norms
_OF_WEIGHTS, _OF_VECTORS = 0.1, 0.03


class LinearReadout(nn.Module):
    """A linear map of an equivariant part, which is normalised first.

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
        self.norm = nn.LayerNorm(equivariant_dim, eps=1e-3)
        self.linear = nn.Linear(equivariant_dim, count)
        nn.init.zeros_(self.linear.bias)

    def forward(self, equivariant: Tensor) -> Tensor:
        """Map ``(B, E)``, any float type, to ``(B, N)`` in float32."""
        return read([self], equivariant)[0]

    def gradient_scales(self) -> dict[Tensor, float]:
        """Give the factors of its parameters' gradients.

        A normalised feature has the length sqrt(E). The longer it is, the smaller the steps must be
        to keep a linear map stable. With scaled gradients the map is stable at
        the encoder's learning rate under SGD, and under LARS, which trains biases and norms by SGD.
        Steps of AdamW, and of Adam without weight decay, stay the same: they don't depend on the
        gradient's scale.
        """
        linear = self.linear
        # the loss is a mean: the more numbers are predicted, the smaller each one's gradient
        of_weight = min(_OF_WEIGHTS, linear.out_features / (8 * linear.in_features))
        vectors = linear.bias, self.norm.weight, self.norm.bias
        return {linear.weight: of_weight, **dict.fromkeys(vectors, _OF_VECTORS)}


def read(readouts: Sequence[LinearReadout], equivariant: Tensor) -> list[Tensor]:
    """Map an equivariant part by several readouts, by one normalisation and one matrix product.

    Args:
        readouts: of equivariant parts of one size.
        equivariant: ``(B, E)``, any float type.

    Returns:
        What each readout reads, ``(B, N)`` in float32.
    """
    linears, norms = [x.linear for x in readouts], [x.norm for x in readouts]
    normalized = F.layer_norm(
        equivariant.to(linears[0].weight.dtype), norms[0].normalized_shape, eps=norms[0].eps
    )
    # the norms' own weights and biases become a part of the maps
    counts = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    scale, shift = (
        torch.cat([p.expand(count, -1) for p, count in zip(some, counts, strict=True)])
        for some in ([norm.weight for norm in norms], [norm.bias for norm in norms])
    )
    bias = torch.cat([linear.bias for linear in linears]) + (weight * shift).sum(dim=1)
    return list(F.linear(normalized, weight * scale, bias).float().split_with_sizes(counts, dim=1))


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
        >>> term, features = PredictionTerm(128, Edges()), torch.rand(4, 128)
        >>> term(term.readout(features), torch.rand(4, 3, 32, 32)).shape
        torch.Size([])
    """

    def __init__(self, equivariant_dim: int, target: PredictionTarget) -> None:
        super().__init__()
        # the attribute's name is a key of checkpoints
        self.told = target
        self.readout = LinearReadout(equivariant_dim, target.count)

    def forward(self, predicted: Tensor, images: Tensor) -> Tensor:
        """Compare the prediction with the views' own numbers.

        Args:
            predicted: what ``readout`` read from the views' equivariant parts, ``(B, N)``.
            images: the views, ``(B, C, H, W)`` in float32.

        Returns:
            The mean squared error, a float32 scalar. Predicting the mean gives about 1, if the
            first batch was like the later ones.
        """
        return F.mse_loss(predicted, self.told(images))
