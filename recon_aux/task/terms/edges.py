"""Where do edges run, and which way? Histograms of a view's gradients, cell by cell."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from recon_aux.task.terms.prediction import PredictionTarget

# along each side of the image
_CELLS = 8
_DIRECTIONS = 8
# of the images, which may be larger, in pixels
_SIDE = 32
# of steepness, below which it is noise
_FLOOR = 0.01


class Edges(PredictionTarget):
    """In each of 8 x 8 cells, how steep the image is in each of 8 directions, as a logarithm.

    From pixels one reads colours far sooner than poses; from these numbers poses, even without an
    encoder. A reconstruction with a small squared error is smooth and has few edges.

    Not in Wang, Krajsek & Scharr; histograms of oriented gradients (Dalal & Triggs, CVPR 2005) as
    what is to be told are those of Wei et al., "Masked Feature Prediction", CVPR 2022.

    Example:
        >>> Edges()(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 512])
    """

    def __init__(self) -> None:
        # a direction's cells share their units, which a small first batch can tell
        super().__init__(_CELLS**2 * _DIRECTIONS, units=_DIRECTIONS)

    def plain(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, 512)``: directions, rows, columns."""
        if images.shape[-1] > _SIDE:
            images = F.adaptive_avg_pool2d(images, _SIDE)
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        x = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
        y = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
        # of the channel where it is steepest
        steepness, channel = torch.hypot(x, y).max(dim=1, keepdim=True)
        turn = torch.atan2(y.gather(1, channel), x.gather(1, channel))
        # a place that is no number would end the process on a GPU
        turn = (turn * (_DIRECTIONS / (2 * math.pi))).nan_to_num()
        # between the two nearest directions, around the circle
        share = turn - turn.floor()
        near = turn.floor().long() % _DIRECTIONS
        steep = images.new_zeros(len(images), _DIRECTIONS, *images.shape[2:])
        steep.scatter_(1, near, (1 - share) * steepness)
        steep.scatter_(1, (near + 1) % _DIRECTIONS, share * steepness)
        return (F.adaptive_avg_pool2d(steep, _CELLS) + _FLOOR).log().flatten(1)
