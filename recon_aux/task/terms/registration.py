"""How a view was moved: the two equivariant parts predict the map from one view to the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon_aux.task.terms.prediction import LinearReadout

# sides at which images are compared, in pixels: the coarse one gives a gradient from farther away
_SIDES = (16, 8)
# keeps poses near zero at the start
_GAIN = 0.3
# added to the variance of a standardised image
_FLOOR = 1e-3

Affine = tuple[Tensor, Tensor]


class Registration(nn.Module):
    """Move one view onto the other by an affine map, and compare.

    A linear map of each equivariant part, normalised, predicts its view's pose: scale, rotation,
    stretch, shear and shift, relative to a pose that all images have in common. Two poses give the
    map from one view to the other. The augmentation's parameters aren't needed: the right map is
    the one that makes the images alike. Each view is also tried mirrored left to right, and the
    better one counts, so such flips need not be known either. Flips upside down aren't tried.

    Not in Wang, Krajsek & Scharr: their decoder must draw what moved; this term must only predict
    how it moved. The idea is unsupervised image registration (Balakrishnan et al., "VoxelMorph",
    IEEE TMI 2019).

    Args:
        equivariant_dim: E, channels of the equivariant part.

    Example:
        >>> features, images = torch.rand(8, 128), torch.rand(8, 3, 32, 32)
        >>> Registration(128)(features, images).shape
        torch.Size([])
    """

    def __init__(self, equivariant_dim: int) -> None:
        super().__init__()
        self.pose = LinearReadout(equivariant_dim, 6)

    def forward(self, equivariant: Tensor, images: Tensor) -> Tensor:
        """Compare each view with the other one, moved.

        Args:
            equivariant: of the first views, then of the others, ``(2*B, E)``.
            images: the views in the same order, ``(2*B, C, H, W)`` in float32, outside of autocast;
                they get no gradient.

        Returns:
            Mean squared difference of the images, each standardised to zero mean and unit variance,
            as a float32 scalar. It is 0 where one is the other one moved, 2 where they have nothing
            in common. Its gradient can't be differentiated again.
        """
        pose = self.pose(equivariant)
        # First dimension: views as they are, and mirrored. Second: first views, and others. All are
        # computed at once, because on a GPU each launch of an operation costs time.
        matrix, shift = _affine(torch.cat([pose, _mirror(pose)]))
        matrix, shift = matrix.view(2, 2, -1, 2, 2), shift.view(2, 2, -1, 2)
        # maps each target's pixels to places in the other view
        matrix, shift = _compose((matrix.flip(1), shift.flip(1)), _inverse((matrix[0], shift[0])))
        motion = torch.cat([matrix, shift[..., None]], dim=-1).flatten(1, 2)
        found = []
        for side in _SIDES:
            targets = _standardized(F.adaptive_avg_pool2d(images, side))
            others = targets.roll(len(targets) // 2, dims=0)
            both = torch.stack([others, others.flip(-1)])
            found.append(_likeness(both, targets, motion))
        likeness, gradient = (torch.stack(x).mean(dim=0) for x in zip(*found, strict=True))
        # adds 0, and attaches the gradient
        likeness = likeness + ((motion - motion.detach()) * gradient).sum(dim=(-2, -1))
        return 2 - 2 * likeness.amax(dim=0).mean()


def _affine(pose: Tensor) -> Affine:
    """``(B, 6)`` -> matrix ``(B, 2, 2)`` with a positive determinant, and shift ``(B, 2)``."""
    # Bounded by a factor of e, a radian, and half the width: a view that left the picture would get
    # no gradient that leads back.
    log_scale, angle, log_stretch, shear, *shift = torch.tanh(_GAIN * pose).unbind(1)
    scale, stretch = log_scale.exp(), log_stretch.exp()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    upper = torch.stack([scale * stretch, scale * shear, zero, scale / stretch], dim=1)
    return rotation @ upper.view(-1, 2, 2), torch.stack(shift, dim=1)


def _mirror(pose: Tensor) -> Tensor:
    """Return the pose of the view's mirror image."""
    scale, angle, stretch, shear, x, y = pose.unbind(1)
    return torch.stack([scale, -angle, stretch, -shear, -x, y], dim=1)


def _inverse(affine: Affine) -> Affine:
    matrix, shift = affine
    (a, b), (c, d) = (row.unbind(-1) for row in matrix.unbind(-2))
    # torch.linalg.inv would wait for the GPU, to see whether the matrix is singular
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
    return images * (images.square().mean(dim=(1, 2, 3), keepdim=True) + _FLOOR).rsqrt()


@torch.no_grad()
def _likeness(images: Tensor, targets: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
    """Move square images bilinearly, with zeros around, and compare them with their targets.

    The gradient is computed by hand. Autograd would launch twice as many operations, and launching
    them is what costs time on a GPU. ``grid_sample`` has no deterministic gradient there.

    Args:
        images: ``(K, B, C, side, side)``.
        targets: standardised, ``(B, C, side, side)``.
        motion: affine maps, matrix and shift side by side, ``(K, B, 2, 3)``.

    Returns:
        The mean product of standardised images and targets, ``(K, B)``, and its gradient with
        respect to the maps, ``(K, B, 2, 3)``.
    """
    channels, side, _ = images.shape[2:]
    line = (2 * torch.arange(side, device=images.device, dtype=images.dtype) + 1) / side - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack([x.flatten(), y.flatten(), torch.ones_like(x).flatten()])
    places = ((motion @ grid + 1) * side - 1) / 2
    # NaN as an index would abort the process on a GPU
    first = places.nan_to_num().floor()
    x, y = (places - first)[:, :, None].unbind(3)
    # along each axis the two nearest lines of pixels, in images padded by a line of zeros
    step = torch.arange(2, device=images.device)[:, None]
    lines = (first[:, :, :, None] + step).clamp(-1, side).long() + 1
    columns, rows = lines.unbind(2)
    index = (rows[:, :, :, None] * (side + 2) + columns[:, :, None]).flatten(2)[:, :, None]
    flat = F.pad(images, (1, 1, 1, 1)).flatten(3)
    corners = flat.gather(3, index.expand(-1, -1, channels, -1))
    upper, upper_right, lower, lower_right = corners.chunk(4, dim=3)
    # derivatives of a moved pixel by its place
    upper_by_x, lower_by_x = upper_right - upper, lower_right - lower
    upper, lower = upper + upper_by_x * x, lower + lower_by_x * x
    by_x, by_y = torch.lerp(upper_by_x, lower_by_x, y), lower - upper
    moved = upper + by_y * y
    moved = moved - moved.mean(dim=3, keepdim=True)
    scale = (moved.square().mean(dim=(2, 3), keepdim=True) + _FLOOR).rsqrt()
    targets = targets.flatten(2)
    likeness = scale * (moved * targets).mean(dim=(2, 3), keepdim=True)
    # both have zero mean, so the mean's own derivative vanishes
    by_pixel = (targets - likeness * scale * moved) * (scale / targets[0].numel())
    by_place = torch.stack([(by_pixel * by_x).sum(dim=2), (by_pixel * by_y).sum(dim=2)], dim=2)
    return likeness[:, :, 0, 0], (by_place * (side / 2)) @ grid.mT
