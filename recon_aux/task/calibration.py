"""Units that the first batch sets: how views' pixels vary."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from recon_aux.task.distributed import agree, are_many, mean_over_processes

Own = TypeVar("Own", bound="Calibrated")


class Calibrated(nn.Module):
    """A module whose buffers the first batch sets.

    They are saved with the model, and kept from then on. Processes that train together set them by
    all their batches; they stay in float32 in a model of half precision.
    """

    def __init__(self) -> None:
        super().__init__()
        # no buffer: asking for it would wait for the device
        self.calibrated = False
        self._agreed = False

    @abstractmethod
    def _measure(self, images: Tensor) -> bool:
        """Set the buffers; say whether the images were fit for that."""

    @torch.no_grad()
    def _calibrate(self, images: Tensor) -> None:
        if are_many() and not self._agreed:
            # one process alone may have loaded them
            self._agreed = True
            self.calibrated = agree(list(self.buffers(recurse=False)), self.calibrated)
        if not self.calibrated:
            self.calibrated = self._measure(images)

    def _apply(self: Own, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Own:
        """Move to a device, but keep the type."""
        moved: Own = super()._apply(  # type: ignore[no-untyped-call]
            lambda x: fn(x) if x.is_meta else x.to(fn(x).device), recurse
        )
        return moved

    def get_extra_state(self) -> Tensor:
        """Save whether the buffers are set, as a tensor, which averages of weights can take."""
        return torch.tensor([self.calibrated], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore whether the buffers are set."""
        self.calibrated = bool(state.any())


class ChannelWhitening(Calibrated):
    """Whitens pixels over their channels, by the statistics of the first batch it sees.

    The loss then means the same whatever units the views come in, and colour counts as much as
    brightness, which varies far more in photographs.

    Args:
        channels: C.
        floor: added to the variance of each direction in colour space, as a fraction of the
            largest, so that channels which carry only noise stay small.

    Example:
        >>> scale = ChannelWhitening(3)
        >>> views = torch.rand(8, 3, 16, 16) * torch.tensor([1.0, 9.0, 80.0])[:, None, None] + 5
        >>> white = scale.whiten(views)
        >>> torch.allclose(scale.restore(white), views, atol=1e-3)
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
        """Views' units -> white, ``(B, C, H, W)`` in float32; the first call sets the scale."""
        self._calibrate(images)
        return torch.einsum("ij,bjhw->bihw", self.to_white, images - self.mean)

    def restore(self, white: Tensor) -> Tensor:
        """White -> views' units, ``(B, C, H, W)`` in float32."""
        white = torch.einsum("ij,bjhw->bihw", self.from_white, white)
        return white + self.mean

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


def color_axes(images: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Tell how pixels vary over their channels, in all processes' images.

    Args:
        images: ``(B, C, H, W)``.

    Returns:
        Their mean ``(C,)``, the variance ``(C,)`` along each principal axis, smallest first, and
        these axes as columns ``(C, C)``, on the CPU in float64. None if pixels don't vary, or
        aren't finite: blank images must not set units, nor what the loss is about to refuse.
    """
    mean = mean_over_processes(images.mean(dim=(0, 2, 3)), len(images))
    pixels = rearrange(images - mean[:, None, None], "b c h w -> c (b h w)")
    covariance = mean_over_processes(pixels @ pixels.T / pixels.shape[1], len(images))
    mean, covariance = mean.cpu().double(), covariance.cpu().double()
    rounding = 1e-10 * mean.square().max()
    if not torch.isfinite(covariance).all() or covariance.diagonal().max() <= rounding:
        return None
    variance, axes = torch.linalg.eigh(covariance)
    # an axis has two directions, of which all processes are to take the same
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return mean, variance.clamp(min=0), axes * largest.sign()
