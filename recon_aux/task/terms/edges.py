"""Where edges run in a view, and which way: histograms of its gradients, cell by cell."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from recon_aux.task.terms.prediction import PredictionTarget
from recon_aux.task.terms.shrinking import shrink

# cells along each side of the image, and directions in each cell, a power of 2
_CELLS, _DIRECTIONS = 8, 8
# side to which larger images are reduced, in pixels
_SIDE = 32
# added to the steepness before the logarithm: edges below it are noise
_FLOOR = 0.01


class Edges(PredictionTarget):
    """How steep an image is in each of 8 x 8 cells and each of 8 directions, as a logarithm.

    A linear map reads poses from these numbers, even without an encoder. From pixels it reads
    colours far better than poses. A reconstruction with a small squared error is smooth, so it has
    few edges.

    Not in Wang, Krajsek & Scharr. Histograms of oriented gradients are by Dalal & Triggs (CVPR
    2005). Wei et al. predict them ("Masked Feature Prediction", CVPR 2022).

    Example:
        >>> Edges()(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 512])
    """

    def __init__(self) -> None:
        # all cells of a direction share one unit: a small first batch is enough to set it
        super().__init__(_CELLS**2 * _DIRECTIONS, units=_DIRECTIONS)

    def plain(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, 512)``: directions, rows, columns."""
        steepness, turn = _steepest(shrink(images, min(_SIDE, images.shape[-1])))
        # the two nearest directions share the steepness
        before = turn.floor()
        after = (turn - before) * steepness
        near = before.long() & (_DIRECTIONS - 1)
        steep = images.new_zeros(len(turn), _DIRECTIONS, *turn.shape[2:])
        steep.scatter_(1, near, steepness - after)
        steep.scatter_(1, (near + 1) & (_DIRECTIONS - 1), after)
        return (shrink(steep, _CELLS) + _FLOOR).log().flatten(1)


def _steepest(images: Tensor) -> tuple[Tensor, Tensor]:
    """Give how steep each pixel is, and its direction, from -4 to 4, both ``(B, 1, H, W)``."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    x = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    y = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    # at each pixel the channel counts that is steepest there
    squares = torch.addcmul(x.square(), y, y)
    steepest = squares.amax(dim=1, keepdim=True)
    # masked_fill takes ten times as long on a CPU
    counts = squares.eq_(steepest)
    x, y = (steps.mul_(counts).sum(dim=1, keepdim=True) for steps in (x, y))
    return steepest.sqrt(), torch.atan2(y, x) * (_DIRECTIONS / (2 * math.pi))
