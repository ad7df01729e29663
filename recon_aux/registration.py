"""How was the view moved? Registering the other view with it, as two equivariant parts say."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .telling import Readout

# sides of the images that are compared, in pixels: the coarse one pulls from afar
_SIDES = (16, 8)

# how far a pose is from none at the start, of the farthest
_GAIN = 0.3

Affine = tuple[Tensor, Tensor]


class Registration(nn.Module):
    """Move one view onto the other by an affine map, and compare.

    A linear map of each equivariant part, normalised, gives its view's pose: scale, rotation,
    stretch, shear and shift against some pose that all images of the kind have in common. Two poses
    make the map from one view to the other. No parameters of the augmentation are needed: what is
    right is what makes the images alike. Each view is also tried mirrored left to right, and the
    better counts, so that such flips need not be known either; flips upside down aren't tried.

    Not in Wang, Krajsek & Scharr: their decoder has to draw what moved, this one only to say how it
    moved. As in unsupervised image registration (Balakrishnan et al., "VoxelMorph", IEEE TMI 2019).

    Args:
        equivariant_dim: E, channels of the equivariant part.

    Example:
        >>> features, images = torch.rand(8, 128), torch.rand(8, 3, 32, 32)
        >>> Registration(128)(features, images).shape
        torch.Size([])
    """

    def __init__(self, equivariant_dim: int) -> None:
        super().__init__()
        self.pose = Readout(equivariant_dim, 6)

    def forward(self, equivariant: Tensor, images: Tensor) -> Tensor:
        """Compare each view with the other one, moved.

        Args:
            equivariant: of the first views, then of the others, ``(2*B, E)``.
            images: the views in the same order, ``(2*B, C, H, W)`` in float32.

        Returns:
            Mean squared difference of the images, each of zero mean and unit variance, as a float32
            scalar: 0 where one is the other one moved, 2 where they have nothing in common.
        """
        pose = self.pose(equivariant)
        # in the first dimension views as they are and mirrored, in the second first and others: all
        # at once, since a GPU takes as long to begin an operation as to do it
        matrix, shift = _affine(torch.cat([pose, _mirror(pose)]))
        matrix, shift = matrix.view(2, 2, -1, 2, 2), shift.view(2, 2, -1, 2)
        # what each target shows is looked for in the other view
        matrix, shift = _compose((matrix.flip(1), shift.flip(1)), _inverse((matrix[0], shift[0])))
        likeness = shift.new_zeros(shift.shape[:-1])
        for side in _SIDES:
            targets = _standardized(F.adaptive_avg_pool2d(images, side))
            targets = targets.view(2, -1, *targets.shape[1:])
            others = targets.flip(0)
            moved = _sample(
                torch.stack([others, others.flip(-1)]).flatten(0, 2),
                matrix.flatten(0, 2),
                shift.flatten(0, 2),
            )
            moved = _standardized(moved).view(2, *targets.shape)
            likeness = likeness + (moved * targets).mean(dim=(-3, -2, -1)) / len(_SIDES)
        return 2 - 2 * likeness.amax(dim=0).mean()


def _affine(pose: Tensor) -> Affine:
    """``(B, 6)`` -> matrix ``(B, 2, 2)``, which never turns an image over, and shift ``(B, 2)``."""
    # no step throws the view out of the picture, whence no gradient leads back: it starts near no
    # motion, and ends at a factor of e, a radian, half the width
    log_scale, angle, log_stretch, shear, *shift = torch.tanh(_GAIN * pose).unbind(1)
    scale, stretch = log_scale.exp(), log_stretch.exp()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    upper = torch.stack([scale * stretch, scale * shear, zero, scale / stretch], dim=1)
    return rotation @ upper.view(-1, 2, 2), torch.stack(shift, dim=1)


def _mirror(pose: Tensor) -> Tensor:
    """Give the pose of the view's mirror image."""
    scale, angle, stretch, shear, x, y = pose.unbind(1)
    return torch.stack([scale, -angle, stretch, -shear, -x, y], dim=1)


def _inverse(affine: Affine) -> Affine:
    matrix, shift = affine
    (a, b), (c, d) = (row.unbind(-1) for row in matrix.unbind(-2))
    # torch's would ask the device whether there is one
    inverse = torch.stack([d, -b, -c, a], dim=-1) / (a * d - b * c)[..., None]
    inverse = inverse.view(matrix.shape)
    return inverse, -_times(inverse, shift)


def _compose(outer: Affine, inner: Affine) -> Affine:
    return outer[0] @ inner[0], _times(outer[0], inner[1]) + outer[1]


def _times(matrix: Tensor, shift: Tensor) -> Tensor:
    moved: Tensor = (matrix @ shift[..., None])[..., 0]
    return moved


def _standardized(images: Tensor) -> Tensor:
    images = images - images.mean(dim=(2, 3), keepdim=True)
    return images * (images.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-3).rsqrt()


def _sample(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Move square images bilinearly, with zeros around; differentiable in the map alone.

    ``grid_sample`` has no deterministic gradient on a GPU.
    """
    n, channels, side, _ = images.shape
    line = (2 * torch.arange(side, device=images.device, dtype=images.dtype) + 1) / side - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()])
    places = torch.einsum("bij,jp->bip", matrix, places) + shift[:, :, None]
    places = ((places + 1) * side - 1) / 2
    # on a GPU, a place that is no number would end the process
    first = places.detach().nan_to_num().floor()
    # along each axis the two nearest lines of pixels, and how much of either
    step = torch.arange(2, device=images.device)[:, None]
    lines = first[:, :, None] + step
    share = (1 - step) + (2 * step - 1) * (places - first)[:, :, None]
    share = share * ((lines >= 0) & (lines < side))
    (columns, rows), (right, down) = lines.clamp(0, side - 1).long().unbind(1), share.unbind(1)
    index = (rows[:, :, None] * side + columns[:, None]).view(n, 1, -1)
    weight = (down[:, :, None] * right[:, None]).view(n, 1, 4, -1)
    corners = images.flatten(2).gather(2, index.expand(-1, channels, -1))
    return (corners.view(n, channels, 4, -1) * weight).sum(dim=2).view(images.shape)
