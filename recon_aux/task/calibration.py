"""Units that the first batch sets: the mean and spread of pixels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from recon_aux.task.distributed import agree, are_many, mean_over_processes

Self = TypeVar("Self", bound="Calibrated")


class Calibrated(nn.Module):
    """A module whose buffers the first batch sets; they stay fixed from then on.

    The buffers are saved with the model. Processes that train together set them by all their
    batches. They stay in float32 in a model of half precision.
    """

    def __init__(self) -> None:
        super().__init__()
        # a plain bool: reading a buffer would wait for the GPU
        self.calibrated = False
        self._agreed = False

    @property
    def has_units(self) -> bool:
        """Whether the buffers are set, in all processes."""
        return self.calibrated and (self._agreed or not are_many())

    @abstractmethod
    def _measure(self, images: Tensor) -> bool:
        """Set the buffers; return False, and set none, if images don't vary or aren't finite."""

    @torch.no_grad()
    def _calibrate(self, images: Tensor) -> None:
        if are_many() and not self._agreed:
            # once: one process alone may have loaded the buffers
            self._agreed = True
            self.calibrated = agree(list(self.buffers(recurse=False)), self.calibrated)
        if not self.calibrated:
            self.calibrated = self._measure(images)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, but keep float32."""
        moved: Self = super()._apply(  # type: ignore[no-untyped-call]
            lambda x: fn(x) if x.is_meta else x.to(fn(x).device), recurse
        )
        return moved

    def get_extra_state(self) -> Tensor:
        """Return whether the buffers are set, as a tensor, which averages of weights can take."""
        return torch.tensor([self.calibrated], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Load what :meth:`get_extra_state` returned."""
        self.calibrated = bool(state.any())


class ChannelWhitening(Calibrated):
    """Whiten pixels over their channels, by the mean and covariance of the first batch.

    The loss then doesn't depend on the views' units. Colour counts as much as brightness, which
    varies far more in photographs.

    Args:
        channels: C.
        floor: added to the variance of each direction in colour space, as a fraction of the
            largest variance. Channels that carry only noise then stay small.

    Example:
        >>> whitening = ChannelWhitening(3)
        >>> views = torch.rand(8, 3, 16, 16) * torch.tensor([1.0, 9.0, 80.0])[:, None, None] + 5
        >>> white = whitening.whiten(views)
        >>> torch.allclose(whitening.restore(white), views, atol=1e-3)
        True
    """

    mean: Tensor
    to_white: Tensor
    from_white: Tensor

    def __init__(self, channels: int, floor: float = 0.3) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("mean", torch.zeros(channels, 1, 1, dtype=torch.float32))
        self.register_buffer("to_white", torch.eye(channels, dtype=torch.float32))
        self.register_buffer("from_white", torch.eye(channels, dtype=torch.float32))

    def whiten(self, images: Tensor) -> Tensor:
        """Whiten ``(B, C, H, W)`` in float32. The first call sets the units."""
        self._calibrate(images)
        return _recolored(self.to_white, images - self.mean)

    def restore(self, white: Tensor) -> Tensor:
        """Turn whitened images ``(B, C, H, W)`` back into the views' units, in float32."""
        return _recolored(self.from_white, white) + self.mean

    def _measure(self, images: Tensor) -> bool:
        colors = color_axes(images)
        if colors is None:
            return False
        mean, variance, axes = colors
        deviation = (variance + self.floor * variance.max()).sqrt()
        self.mean.copy_(mean[:, None, None])
        self.to_white.copy_(axes @ torch.diag(1 / deviation) @ axes.T)
        self.from_white.copy_(axes @ torch.diag(deviation) @ axes.T)
        return True


def _recolored(matrix: Tensor, images: Tensor) -> Tensor:
    pixels = matrix.expand(len(images), -1, -1).bmm(images.flatten(2))
    return pixels.view_as(images)


def color_axes(images: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Find the principal axes of the pixels' colours, over the images of all processes.

    Args:
        images: ``(B, C, H, W)``.

    Returns:
        The mean colour ``(C,)``, the variance ``(C,)`` along each axis, smallest first, and the
        axes as columns ``(C, C)``, on the CPU in float64. None if pixels don't vary or aren't
        finite: blank images must not set units, nor must images that the loss will refuse.
    """
    mean = mean_over_processes(images.mean(dim=(0, 2, 3)), len(images))
    pixels = rearrange(images - mean[:, None, None], "b c h w -> c (b h w)")
    covariance = mean_over_processes(pixels @ pixels.T / pixels.shape[1], len(images))
    mean, covariance = mean.cpu().double(), covariance.cpu().double()
    rounding = 1e-10 * mean.square().max()
    if not torch.isfinite(covariance).all() or covariance.diagonal().max() <= rounding:
        return None
    variance, axes = torch.linalg.eigh(covariance)
    # an axis has two directions; all processes must take the same
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return mean, variance.clamp(min=0), axes * largest.sign()
