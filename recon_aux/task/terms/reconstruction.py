"""The error between a reconstruction and the view that it rebuilds."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from recon_aux.task.checks import check_choice, check_nonnegative

LossKind = Literal["mse", "l1", "smooth_l1"]


def resize_view(view: Tensor, target_size: int) -> Tensor:
    """Resize a view to ``target_size`` pixels square, antialiased, in float32 without gradient.

    It multiplies matrices, with the precision that ``torch.set_float32_matmul_precision`` sets.

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
    batch, channels, height, width = view.shape
    rows, columns = (_resizing(side, target_size, view.device) for side in (height, width))
    # the channels of channels_last stand beside the columns: nothing of full size is copied
    is_last = view.is_contiguous(memory_format=torch.channels_last) and not view.is_contiguous()
    flat = view.movedim(1, 3).flatten(2) if is_last else view.flatten(0, 1)
    with torch.autocast(view.device.type, enabled=False):
        lines = rows.expand(len(flat), -1, -1).bmm(flat)
        if is_last:
            lines = lines.view(batch, -1, width, channels).movedim(3, 1)
        lines = lines.reshape(-1, width).mm(columns.mT)
    return lines.view(batch, channels, target_size, target_size)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _resizing(side: int, target_size: int, device: torch.device) -> Tensor:
    """Make the matrix ``(target_size, side)`` that resizes a line of pixels, antialiased."""
    lines = torch.eye(side, dtype=torch.float32, device=device)[None, None]
    size = (target_size, side)
    return F.interpolate(lines, size, mode="bilinear", align_corners=False, antialias=True)[0, 0]


class ReconstructionLoss(nn.Module):
    """Mean error per pixel and channel between a reconstruction and its target, in float32.

    Args:
        kind: ``"mse"``, ``"l1"`` or ``"smooth_l1"``.
        structure: weight of a second term: the same error after each patch of both images has been
            normalised to zero mean and unit variance. It compares what is in a patch, whatever its
            colour and contrast.
        normalize_patches: normalise each patch of the target so, but not the reconstruction (He et
            al., "Masked Autoencoders", CVPR 2022, section 3).
        patch_size: side of such a patch, in pixels; it must divide height and width.

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
        check_nonnegative("structure", structure)
        check_choice("loss", kind, get_args(LossKind))
        self.kind = kind
        self.structure = structure
        self.normalize_patches = normalize_patches
        self.patch_size = patch_size

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Compare a reconstruction with its target.

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
                f"got {tuple(reconstruction.shape)}. Pass two of one shape."
            )
        return self.of_patches(*(to_patches(x, self.patch_size) for x in (reconstruction, target)))

    def of_patches(self, got: Tensor, expected: Tensor) -> Tensor:
        """Compare the patches of a reconstruction with its target's, both ``(B, P, N)``."""
        got, expected = got.float(), expected.float()
        error = getattr(F, f"{self.kind}_loss")
        loss: Tensor = error(
            got, _normalized(expected, 1e-6) if self.normalize_patches else expected
        )
        if self.structure:
            # a flat patch has only noise, which a smaller floor would amplify
            normalized = [_normalized(patches, 0.01) for patches in (got, expected)]
            loss = torch.add(loss, error(*normalized), alpha=self.structure)
        return loss

    def extra_repr(self) -> str:
        """Show the options in the module's printout."""
        names = ("kind", "structure", "normalize_patches")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def to_patches(images: Tensor, patch_size: int) -> Tensor:
    """Cut ``(B, C, H, W)`` into square patches, row by row, ``(B, P, N)``."""
    p = patch_size
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)


def _normalized(patches: Tensor, floor: float) -> Tensor:
    count = patches.shape[-1]
    # layer_norm divides by the variance of a population, this by that of a sample
    ratio = (count - 1) / count
    weight = patches.new_full((count,), ratio**0.5)
    return F.layer_norm(patches, (count,), weight, eps=floor * ratio)
