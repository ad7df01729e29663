"""How was the view moved? Registering the other view with it, as two equivariant parts say."""

from __future__ import annotations

from itertools import product

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
        poses = self.pose(equivariant).chunk(2)
        affine = [_affine(pose) for pose in poses]
        mirrored = [_affine(_mirror(pose)) for pose in poses]
        inverse = [_inverse(pose) for pose in affine]
        moves = [
            _compose(source[1 - target], inverse[target])
            for target in (0, 1)
            for source in (affine, mirrored)
        ]
        matrix, shift = (torch.cat(parts) for parts in zip(*moves, strict=True))
        likeness = matrix.new_zeros(len(matrix))
        for side in _SIDES:
            small = _standardized(F.adaptive_avg_pool2d(images, side)).chunk(2)
            sources = torch.cat([small[1], small[1].flip(-1), small[0], small[0].flip(-1)])
            targets = torch.cat([small[0], small[0], small[1], small[1]])
            moved = _standardized(_sample(sources, matrix, shift))
            likeness = likeness + (moved * targets).mean(dim=(1, 2, 3)) / len(_SIDES)
        # targets, the source as it is or mirrored, images
        return 2 - 2 * likeness.view(2, 2, -1).amax(dim=1).mean()


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
    (a, b), (c, d) = (row.unbind(1) for row in matrix.unbind(1))
    # torch's would ask the device whether there is one
    inverse = torch.stack([d, -b, -c, a], dim=1) / (a * d - b * c)[:, None]
    inverse = inverse.view(-1, 2, 2)
    return inverse, -torch.einsum("bij,bj->bi", inverse, shift)


def _compose(outer: Affine, inner: Affine) -> Affine:
    return outer[0] @ inner[0], torch.einsum("bij,bj->bi", outer[0], inner[1]) + outer[1]


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
    (column, row), (right, down) = first.unbind(1), (places - first).unbind(1)
    flat = images.flatten(2)
    sampled = torch.zeros_like(flat)
    for i, j in product((0, 1), (0, 1)):
        near = column + i, row + j
        weight = (right if i else 1 - right) * (down if j else 1 - down)
        for line in near:
            weight = weight * ((line >= 0) & (line < side))
        x, y = (line.clamp(0, side - 1).long() for line in near)
        index = (y * side + x)[:, None].expand(-1, channels, -1)
        sampled = sampled + flat.gather(2, index) * weight[:, None]
    return sampled.view(n, channels, side, side)
