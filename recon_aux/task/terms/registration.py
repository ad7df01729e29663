"""How a view was moved: the two equivariant parts predict the map from one view to the other."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon_aux.task.terms.prediction import LinearReadout
from recon_aux.task.terms.shrinking import shrink

# sides at which images are compared, in pixels: the coarse one gives a gradient from farther away
_SIDES = (16, 8)
# keeps poses near zero at the start
_GAIN = 0.3
# added to the variance of a standardised image
_FLOOR = 1e-3
# lines of zeros around an image; places farther away are moved there
_MARGIN = 2


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
        >>> registration, features = Registration(128), torch.rand(8, 128)
        >>> poses = registration.readout(features)
        >>> registration(poses, torch.rand(8, 3, 32, 32)).shape
        torch.Size([])
    """

    def __init__(self, equivariant_dim: int) -> None:
        super().__init__()
        # the attribute's name is a key of checkpoints
        self.pose = LinearReadout(equivariant_dim, 6)

    @property
    def readout(self) -> LinearReadout:
        """What reads a pose from an equivariant part."""
        return self.pose

    def forward(self, poses: Tensor, images: Tensor) -> Tensor:
        """Compare each view with the other one, moved.

        Args:
            poses: of the first views, then of the others, ``(2*B, 6)``.
            images: the views in the same order, ``(2*B, C, H, W)`` in float32; they get no
                gradient.

        Returns:
            Mean squared difference of the images, each standardised to zero mean and unit variance,
            as a float32 scalar. It is 0 where one is the other one moved, 2 where they have nothing
            in common. Its gradient can't be differentiated again.
        """
        difference: Tensor = _Difference.apply(motions(poses), images)
        return difference


def motions(poses: Tensor) -> Tensor:
    """Give the maps from each view's pixels to places in the other view.

    A pose is a map, too: a place in the picture is stretched and sheared, scaled, turned, moved.
    The map from one view to the other undoes one pose and applies the other.

    Args:
        poses: of the first views, then of the others, ``(2*B, 6)``.

    Returns:
        Matrix and shift side by side, ``(2*B, 2, 2, 3)``: for the other view as it is, and
        mirrored.
    """
    constants, half = _constants(poses.device), len(poses) // 2
    # Bounded by a factor of e, a radian, and half the width: a view that left the picture would get
    # no gradient that leads back.
    numbers = _product(torch.tanh(_GAIN * poses), constants.factors, constants.offsets)
    logarithms, shears, angles, shift, back = numbers.split_with_sizes([12, 12, 12, 4, 2], dim=1)
    turn, upper = angles.sin().view(-1, 2, 2), (logarithms.exp() * shears).view(-1, 2, 2)
    matrices = _product(turn, upper).view(-1, 3, 2, 2)
    matrix, inverse = matrices.split_with_sizes([2, 1], dim=1)
    other = _product(matrix.roll(half, dims=0).flatten(1, 2), inverse.select(1, 0).mT)
    moved = _product(other, back[..., None], shift.roll(half, dims=0)[..., None])
    return torch.cat([other, moved], dim=2).view(-1, 2, 2, 3)


class _Difference(torch.autograd.Function):
    """The mean squared difference, of which the forward pass computes the gradient.

    Autograd would launch twice as many operations, and on a GPU launching is what costs time.
    ``grid_sample`` has no deterministic gradient there.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, images: Tensor) -> Tensor:
        alike, gradient = likeness(maps, images)
        best, index = alike.max(dim=1, keepdim=True)
        factors = (index == _constants(images.device).views).to(gradient) * (-2 / len(maps))
        ctx.save_for_backward(factors[:, :, None, None] * gradient)
        return torch.rsub(best.mean(), 2, alpha=2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_difference: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return by_difference * gradient, None


@torch.no_grad()
def likeness(maps: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Move the other view bilinearly, with zeros around, and compare it with each view.

    Images are compared at all of ``_SIDES`` at once: their pixels stand in one line, P together.

    Args:
        maps: as of :func:`motions`, ``(2*B, 2, 2, 3)``.
        images: ``(2*B, C, H, W)``.

    Returns:
        The mean product of standardised images, ``(2*B, 2)``, and its gradient with respect to the
        maps, ``(2*B, 2, 2, 3)``.
    """
    constants = _constants(images.device)
    targets = torch.cat([shrink(images, side).flatten(2) for side in _SIDES], dim=2)
    targets = _centered(targets, constants)
    power = _product(targets.square().mean(dim=1), constants.mean, constants.floor)
    targets = targets * _product(power.rsqrt(), constants.spread)[:, None]
    moved, by_place = _moved(maps, targets.roll(len(targets) // 2, dims=0), constants)
    moved, targets = _centered(moved, constants), targets[:, None]
    products = torch.stack([(moved * x).mean(dim=2) for x in (moved, targets)], dim=2)
    means = _product(products.flatten(0, 2), constants.mean).view(*products.shape[:3], -1)
    power, product = means.unbind(2)
    scale = (power + _FLOOR).rsqrt()
    alike = scale * product
    # both have zero mean, so the mean's own derivative vanishes
    factors = torch.stack([scale, alike * scale * scale], dim=2)
    factors = _product(factors.flatten(0, 2), constants.share).view(products.shape)
    by_target, by_moved = factors[:, :, :, None].unbind(2)
    by_pixel = torch.addcmul(by_target * targets, by_moved, moved, value=-1)
    by_place = by_place.mul_(by_pixel[:, :, None]).mean(dim=3)
    by_map = _product(by_place.flatten(0, 2), constants.grid.mT)
    return alike.mean(dim=2), by_map.view(maps.shape)


def _moved(maps: Tensor, images: Tensor, constants: _Constants) -> tuple[Tensor, Tensor]:
    """Move images by both maps.

    Args:
        maps: as of :func:`motions`, ``(2*B, 2, 2, 3)``.
        images: ``(2*B, C, P)``.

    Returns:
        The moved images, ``(2*B, 2, C, P)``, and the derivatives of their pixels by the place where
        they are read, ``(2*B, 2, 2, C, P)``: to the right, then downwards.
    """
    corners, fractions = _corners(maps, images, constants)
    left, right = corners.unbind(4)
    x, y = fractions[:, :, :, None].unbind(2)
    # in place, since memory takes longer than arithmetic
    by_x = right.sub_(left)
    upper, lower = left.addcmul_(by_x, x[:, :, :, None]).unbind(3)
    by_x, by_y = by_x[:, :, :, 0].lerp(by_x[:, :, :, 1], y), lower.sub_(upper)
    return torch.addcmul(upper, by_y, y), torch.stack([by_x, by_y], dim=2)


def _corners(maps: Tensor, images: Tensor, constants: _Constants) -> tuple[Tensor, Tensor]:
    """Read the four pixels around each place, ``(2*B, 2, C, 2, 2, P)``: rows, then columns.

    And return how far from the first of them the place is, as of :func:`_places`.
    """
    count, channels = images.shape[:2]
    sides = zip(images.split_with_sizes([side**2 for side in _SIDES], dim=2), _SIDES, strict=True)
    squares = (pixels.view(count, channels, side, side) for pixels, side in sides)
    images = torch.cat([F.pad(square, [_MARGIN] * 4).flatten(2) for square in squares], dim=2)
    index, fractions = _places(maps, constants)
    index = index[:, :, None].expand(-1, -1, channels, -1)
    corners = images[:, None].expand(-1, 2, -1, -1).gather(3, index)
    return corners.view(count, 2, channels, 2, 2, -1), fractions


def _places(maps: Tensor, constants: _Constants) -> tuple[Tensor, Tensor]:
    """Find where maps read: four pixels each, and the place between them.

    Returns:
        Numbers of pixels in images with a margin, ``(2*B, 2, 4*P)``: upper left, upper right, lower
        left, lower right. And how far to the right and downwards, from 0 to 1, ``(2*B, 2, 2, P)``.
    """
    grid = constants.grid.expand(maps.shape[0] * maps.shape[1], -1, -1)
    places = _product(maps.flatten(0, 1), grid, constants.center).view(*maps.shape[:3], -1)
    first = places.floor()
    # NaN becomes a large number, which is clamped
    columns, rows = first.long().clamp(constants.least, constants.most).unbind(2)
    begin = torch.addcmul(columns * constants.step, rows, constants.width)
    return (begin[:, :, None] + constants.corners).flatten(2), places - first


def _centered(pixels: Tensor, constants: _Constants) -> Tensor:
    """Subtract from pixels ``(..., P)`` the mean of their image, at each of ``_SIDES``."""
    lines = pixels.flatten(0, -2)
    means = _product(lines, constants.mean)
    return _product(means, constants.spread, lines, alpha=-1).view(pixels.shape)


def _product(left: Tensor, right: Tensor, offset: Tensor | None = None, alpha: int = 1) -> Tensor:
    """Give ``alpha * left @ right + offset``, of matrices or of batches of them."""
    if torch.compiler.is_compiling():
        # elementwise, so that the compiler fuses it with what is around it
        product = alpha * (left[..., None] * right[..., None, :, :]).sum(dim=-2)
        return product if offset is None else product + offset
    if offset is None:
        return torch.mm(left, right) if left.ndim == 2 else torch.bmm(left, right)
    add = torch.addmm if left.ndim == 2 else torch.baddbmm
    return add(offset, left, right, alpha=alpha)


class _Constants(NamedTuple):
    """Numbers that are the same in every step.

    Attributes:
        factors: what makes numbers of a pose, ``(6, 42)``; see :func:`_numbers_of_a_pose`.
        offsets: what is added to them, ``(42,)``.
        views: the numbers of the two views that are tried, ``(2,)``.
        grid: places x, y, 1 in the picture, times half the side, ``(3, P)``.
        center: of the picture, in pixels, ``(P,)``.
        least: first row or column of an upper left pixel, in the margin, ``()``.
        most: the last one, ``(P,)``.
        width: of an image with its margin, ``(P,)``.
        step: to the next column, of the image and of the mirrored one, ``(2, 1)``.
        corners: numbers of the four pixels that are read at the place 0, 0, ``(2, 4, P)``.
        floor: added to the power of an image, ``()``.
        mean: averages over each side's pixels, ``(P, sides)``.
        spread: gives each side's number to its pixels, ``(sides, P)``.
        share: likewise, times a pixel's share in the likeness, ``(sides, P)``.
    """

    factors: Tensor
    offsets: Tensor
    views: Tensor
    grid: Tensor
    center: Tensor
    least: Tensor
    most: Tensor
    width: Tensor
    step: Tensor
    corners: Tensor
    floor: Tensor
    mean: Tensor
    spread: Tensor
    share: Tensor


# compiled code takes them as constants: tracing into the cached function would warn
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constants(device: torch.device) -> _Constants:
    return _made_constants(device)


# a tensor that is made in inference mode can't be saved for a backward pass
@cache
@torch.inference_mode(False)
def _made_constants(device: torch.device) -> _Constants:
    grids, corners, begin = [], [], 0
    for side in _SIDES:
        # half precision may be torch's default in training
        places = (2 * torch.arange(side, dtype=torch.float32) + 1) / side - 1
        y, x = (grid.flatten() for grid in torch.meshgrid(places, places, indexing="ij"))
        grids.append(torch.stack([x, y, torch.ones_like(x)]) * side / 2)
        width = side + 2 * _MARGIN
        left = begin + _MARGIN * (width + 1)
        right = left + side - 1
        square = [[left, left + 1], [right, right - 1]]
        corner = torch.tensor([[*pair, *(x + width for x in pair)] for pair in square])
        corners.append(corner[..., None].expand(-1, -1, side**2))
        begin += width**2
    sides = torch.cat([torch.full((side**2,), side) for side in _SIDES])
    spread = torch.stack([(sides == side).float() for side in _SIDES])
    mean = spread / spread.sum(dim=1, keepdim=True)
    factors, offsets = _numbers_of_a_pose()
    found = _Constants(
        factors=factors,
        offsets=offsets,
        views=torch.arange(2),
        grid=torch.cat(grids, dim=1),
        center=(sides - 1).float() / 2,
        least=torch.tensor(-_MARGIN),
        most=sides,
        width=sides + 2 * _MARGIN,
        step=torch.tensor([[1], [-1]]),
        corners=torch.cat(corners, dim=2),
        floor=torch.tensor(_FLOOR, dtype=torch.float32),
        mean=mean.T,
        spread=spread,
        share=mean / len(_SIDES),
    )
    return _Constants(*(x.to(device) for x in found))


def _numbers_of_a_pose() -> tuple[Tensor, Tensor]:
    """Give the factors ``(6, 42)`` and offsets ``(42,)`` that make of a pose what its map needs.

    A pose is scale, angle, stretch, shear, x and y. Its matrix is a rotation times an upper
    triangle ``[[e^(scale + stretch), e^scale * shear], [0, e^(scale - stretch)]]``. Three matrices
    are made: of the pose, of the mirrored pose, and the transposed inverse of the first.
    """
    scale, angle, stretch, shear, x, y = torch.eye(6, dtype=torch.float32)
    # e to the power of -1000 is 0
    one, zero = (none := torch.zeros_like(x), 1.0), (none, -1e3)
    triangle = [scale + stretch, scale, zero, scale - stretch]
    inverse = [-scale - stretch, zero, -scale, stretch - scale]
    logarithms = [*triangle, *triangle, *inverse]
    shears = [one, shear, one, one, one, -shear, one, one, one, one, -shear, one]
    # cos, -sin, sin and cos, as sines
    quarters = [1, 2, 0, 1]
    angles = [(a, q * math.pi / 2) for a in (angle, -angle, angle) for q in quarters]
    shift, back = [x, y, -x, y], [-x, -y]
    numbers = [*logarithms, *shears, *angles, *shift, *back]
    pairs = [number if isinstance(number, tuple) else (number, 0.0) for number in numbers]
    offsets = torch.tensor([offset for _, offset in pairs], dtype=torch.float32)
    return torch.stack([factors for factors, _ in pairs], dim=1), offsets
