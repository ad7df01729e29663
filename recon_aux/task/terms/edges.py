"""Where edges run in a view, and which way: histograms of its gradients, cell by cell."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from recon_aux.task.terms.prediction import PredictionTarget

# cells along each side of the image, and directions in each cell, a power of 2
_CELLS, _DIRECTIONS = 8, 8
# side to which larger images are reduced, in pixels
_SIDE = 32
# of steepness; below it edges are noise
_FLOOR = 0.01


class Edges(PredictionTarget):
    """How steep an image is in each of 8 x 8 cells and each of 8 directions, as a logarithm.

    A linear map reads poses from these numbers, even without an encoder. From pixels it reads
    colours far sooner than poses. A reconstruction with a small squared error is smooth, so it has
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
        if images.shape[-1] > _SIDE:
            images = F.adaptive_avg_pool2d(images, _SIDE)
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        x = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
        y = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
        # at each pixel the channel counts that is steepest there
        squares = torch.addcmul(x.square(), y, y)
        steepest = squares.amax(dim=1, keepdim=True)
        # masked_fill takes ten times as long on a CPU
        counts = (squares == steepest).to(x.dtype)
        x, y = ((steps * counts).sum(dim=1) for steps in (x, y))
        turn = torch.atan2(y, x)
        turn = turn * (_DIRECTIONS / (2 * math.pi))
        # the two nearest directions share the steepness
        before = turn.floor()
        near = torch.stack([before, before + 1], dim=1).long() & (_DIRECTIONS - 1)
        steepness = steepest.sqrt()
        after = (turn - before)[:, None] * steepness
        steep = images.new_zeros(len(images), _DIRECTIONS, *images.shape[2:])
        steep.scatter_(1, near, torch.cat([steepness - after, after], dim=1))
        return (F.adaptive_avg_pool2d(steep, _CELLS) + _FLOOR).log().flatten(1)
