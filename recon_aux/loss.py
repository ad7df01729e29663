"""How far is a reconstruction from the view it rebuilds?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

LossKind = Literal["mse", "l1", "smooth_l1"]

_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
}


def resize_view(view: Tensor, target_size: int) -> Tensor:
    """Resize a view to ``target_size`` pixels square, antialiased, in float32 without gradient.

    Args:
        view: ``(B, C, H, W)``, any float type.
        target_size: height and width of the result, in pixels.

    Returns:
        ``(B, C, target_size, target_size)`` in float32.

    Example:
        >>> resize_view(torch.rand(2, 3, 96, 64), 32).shape
        torch.Size([2, 3, 32, 32])
    """
    view = view.detach().float()
    if view.shape[-2:] == (target_size, target_size):
        return view
    size = (target_size, target_size)
    return F.interpolate(view, size, mode="bilinear", align_corners=False, antialias=True)


class PixelScale(nn.Module):
    """Whitens pixels over their channels, by the statistics of the first batch it sees.

    The loss then means the same whatever units the views come in, and colour counts as much as
    brightness, which varies far more in photographs. The statistics are buffers: saved with the
    model, and kept from then on. Processes that train together use those of all their batches.

    Args:
        channels: C.
        floor: added to the variance of each direction in colour space, as a fraction of the
            largest, so that channels which carry only noise stay small.

    Example:
        >>> scale = PixelScale(3)
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
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("to_white", torch.eye(channels))
        self.register_buffer("from_white", torch.eye(channels))
        # no buffer: asking for it would wait for the device
        self.calibrated = False
        self._agreed = False

    def whiten(self, images: Tensor) -> Tensor:
        """Views' units -> white, ``(B, C, H, W)`` in float32; the first call sets the scale."""
        self._calibrate(images)
        return torch.einsum("ij,bjhw->bihw", self.to_white.float(), images - self.mean.float())

    def restore(self, white: Tensor) -> Tensor:
        """White -> views' units, ``(B, C, H, W)`` in float32."""
        white = torch.einsum("ij,bjhw->bihw", self.from_white.float(), white)
        return white + self.mean.float()

    @torch.no_grad()
    def _calibrate(self, images: Tensor) -> None:
        self._agree()
        if self.calibrated:
            return
        mean = _mean_over_processes(images.mean(dim=(0, 2, 3)), len(images))[:, None, None]
        pixels = rearrange(images - mean, "b c h w -> c (b h w)")
        covariance = _mean_over_processes(pixels @ pixels.T / pixels.shape[1], len(images))
        covariance = covariance.cpu().double()
        # blank images must not become the scale, nor what the loss is about to refuse
        if not torch.isfinite(covariance).all() or not covariance.any():
            return
        variance, directions = torch.linalg.eigh(covariance)
        deviation = (variance + self.floor * variance.max()).sqrt()
        self.mean.copy_(mean)
        self.to_white.copy_(directions @ torch.diag(1 / deviation) @ directions.T)
        self.from_white.copy_(directions @ torch.diag(deviation) @ directions.T)
        self.calibrated = True

    def _agree(self) -> None:
        """Take the scale over where one process alone has loaded it."""
        if self._agreed or not _are_many():
            return
        self._agreed = True
        knowing = self.mean.new_tensor(float(self.calibrated))
        distributed.all_reduce(knowing)
        if 0 < knowing < distributed.get_world_size():
            for scale in (self.mean, self.to_white, self.from_white):
                scale.mul_(float(self.calibrated))
                distributed.all_reduce(scale)
                scale.div_(knowing)
            self.calibrated = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PixelScale:
        """Move to a device, but stay in float32 in a model of half precision."""
        moved: PixelScale = super()._apply(  # type: ignore[no-untyped-call]
            lambda x: fn(x) if x.is_meta else x.to(fn(x).device), recurse
        )
        return moved

    def get_extra_state(self) -> Tensor:
        """Save whether the scale is set, as a tensor, which averages of weights can take."""
        return torch.tensor([self.calibrated], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore whether the scale is set."""
        self.calibrated = bool(state.any())


def _are_many() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _mean_over_processes(mean: Tensor, count: int) -> Tensor:
    """Weigh each process's mean with its number of images."""
    if not _are_many():
        return mean
    weighted = torch.cat([mean.flatten() * count, mean.new_tensor([count])])
    distributed.all_reduce(weighted)
    return (weighted[:-1] / weighted[-1]).view_as(mean)


class ReconstructionLoss(nn.Module):
    """Mean error per pixel and channel between a reconstruction and its target, in float32.

    Args:
        kind: ``"mse"``, ``"l1"`` or ``"smooth_l1"``.
        structure: weight of a second term, the same error after each patch of both images has
            been given zero mean and unit variance: what is in a patch, whatever its colour and
            contrast.
        normalize_patches: compare to a target whose every patch has been normalised so, the
            reconstruction as it is (He et al., "Masked Autoencoders", CVPR 2022, section 3).
        patch_size: side of such a patch, in pixels; divides height and width.

    Raises:
        ValueError: if ``kind`` is none of these or ``structure`` is out of range.

    Example:
        >>> target = torch.rand(2, 3, 8, 8)
        >>> round(ReconstructionLoss()(target + 0.5, target).item(), 4)
        0.25
    """

    def __init__(
        self,
        kind: LossKind = "mse",
        *,
        structure: float = 0.0,
        normalize_patches: bool = False,
        patch_size: int = 8,
    ) -> None:
        super().__init__()
        if not 0 <= structure < float("inf"):
            raise ValueError(f"expected a finite structure= of 0 or more, got {structure}")
        if kind not in _KINDS:
            raise ValueError(f"expected loss= to be one of {get_args(LossKind)}, got {kind!r}")
        self.kind = kind
        self.structure = structure
        self.normalize_patches = normalize_patches
        self.patch_size = patch_size

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Compare.

        Args:
            reconstruction: ``(B, C, H, W)``.
            target: the same shape.

        Returns:
            The loss, a float32 scalar.

        Raises:
            ValueError: if the shapes differ.
        """
        if reconstruction.shape != target.shape:
            raise ValueError(
                f"expected a reconstruction shaped like its target {tuple(target.shape)}, "
                f"got {tuple(reconstruction.shape)}"
            )
        error = _KINDS[self.kind]
        got, expected = self._patches(reconstruction.float()), self._patches(target.float())
        loss = error(got, _normalized(expected, 1e-6) if self.normalize_patches else expected)
        if self.structure:
            # a flat patch has no structure, only noise, which a smaller floor would blow up
            loss = loss + self.structure * error(
                _normalized(got, 0.01), _normalized(expected, 0.01)
            )
        return loss

    def _patches(self, image: Tensor) -> Tensor:
        p = self.patch_size
        return rearrange(image, "b c (h p) (w q) -> b h w (p q c)", p=p, q=p)

    def extra_repr(self) -> str:
        """Show the options in the module's printout."""
        return (
            f"kind={self.kind!r}, structure={self.structure}, "
            f"normalize_patches={self.normalize_patches}"
        )


def _normalized(patches: Tensor, floor: float) -> Tensor:
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + floor).sqrt()
